"""A small writer for ONNX graphs: nodes in, value names out.

Families (`convert/families/`) describe a network as calls on a `Graph`; each call appends one
node and returns the name of its output.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
_IR_VERSION = 9
_CONTRIB = "com.microsoft"
_ALIGNMENT = 4096
_WRITERS = 4
_PART_BYTES = 1 << 23
"""So many bytes a writer holds at once: what is much larger is new memory every time."""


Target = Literal["cpu", "cuda"]
"""The kind of execution provider that a graph is written for."""


class Place(msgspec.Struct, frozen=True):
    """Where numbers lie: in a file of that name beside the model file, so many bytes.

    `dtype` is their type as ONNX numbers it.
    """

    file: str
    offset: int
    length: int
    shape: Sequence[int]
    dtype: int = TensorProto.FLOAT


class Graph:
    """One ONNX graph under construction.

    Args:
        name: the graph's name, shown by viewers.
        external: file for the weights, beside the model file; None keeps them inside it, which
            protobuf allows up to 2 GiB.
        target: where it is to run.
        half: float16 or bfloat16: all floating-point numbers are of that type, but those that
            `single` gives; None: float32.
    """

    def __init__(
        self,
        name: str,
        external: Path | None = None,
        *,
        target: Target = "cpu",
        half: Any = None,
    ) -> None:
        self.name, self.target = name, target
        self.half = half
        self._dtype = np.dtype(half or np.float32)
        self._external = external
        self._file = external.open("wb") if external else None
        self._nodes: list[onnx.NodeProto] = []
        self._count = 0
        self._weights: dict[str, onnx.TensorProto] = {}
        self.borrowed: set[str] = set()
        """Names of further files that have to lie beside the model file."""
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: str | int, dtype: int = TensorProto.INT64) -> str:
        """Declare an input of the given shape, whose symbolic sizes are names."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, *shape: str | int) -> None:
        """Declare `value` as the float32 output `name`."""
        if self.half:
            value = self.node("Cast", value, to=TensorProto.FLOAT)
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Store an initializer; returns its name."""
        assert name not in self._weights
        self._weights[name] = self._store(name, np.ascontiguousarray(self._typed(value)))
        return name

    def stream(
        self, name: str, shape: Sequence[int], rows: Callable[[int, int], NDArray[Any]]
    ) -> str:
        """Store an initializer of float32; returns its name.

        `rows(start, stop)` gives some of them and is called by several threads: the system takes
        longer to find memory for a file than a thread does to fill it.
        """
        assert name not in self._weights
        if self._file is None or self._external is None:
            return self.weight(name, rows(0, shape[0]))
        path, width = self._external, self._dtype.itemsize * math.prod(shape[1:])
        place = self._place(shape[0] * width)
        step = max(1, _PART_BYTES // max(1, width))

        def write(start: int) -> None:
            part = np.ascontiguousarray(self._typed(rows(start, min(start + step, shape[0]))))
            with path.open("r+b") as file:
                file.seek(int(place["offset"]) + start * width)
                file.write(_bytes(part))

        with ThreadPoolExecutor(_WRITERS) as writers:
            for _ in writers.map(write, range(0, shape[0], step)):
                pass  # but for what it raises
        self._file.seek(0, os.SEEK_END)
        dtype = helper.np_dtype_to_tensor_dtype(self._dtype)
        self._weights[name] = _external(name, shape, dtype, place)
        return name

    def borrow(self, name: str, place: Place) -> str:
        """Name an initializer that lies in a file beside the model file; returns its name."""
        assert name not in self._weights
        self.borrowed.add(place.file)
        location: dict[str, str | int] = {
            "location": place.file,
            "offset": place.offset,
            "length": place.length,
        }
        self._weights[name] = _external(name, place.shape, place.dtype, location)
        return name

    def constant(self, value: int | float | Sequence[int] | np.generic | NDArray[Any]) -> str:
        """A constant, stored once however often it is used: float32, int64 or numpy's own type."""
        return self._constant(f"const:{value!r}", self._typed(_array(value)))

    def exact(self, value: float) -> str:
        """A float32 constant, whatever the graph computes in."""
        name = f"exact:{value!r}" if self.half else f"const:{value!r}"
        return self._constant(name, _array(value))

    def single(self, value: str) -> str:
        """The value as float32: what is summed over many tokens is."""
        return self.node("Cast", value, to=TensorProto.FLOAT) if self.half else value

    def narrow(self, value: str) -> str:
        """A float32 value in the type that the graph computes in."""
        if not self.half:
            return value
        return self.node("Cast", value, to=helper.np_dtype_to_tensor_dtype(self._dtype))

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append one standard node with one output; an empty name skips an optional input."""
        return self._append(op, inputs, "", attributes)[0]

    def contrib(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append one of ONNX Runtime's contrib operators."""
        return self._append(op, inputs, _CONTRIB, attributes)[0]

    def node_outputs(
        self, op: str, outputs: int, *inputs: str, **attributes: Any
    ) -> tuple[str, ...]:
        """The same as `node` with so many outputs."""
        return self._append(op, inputs, "", attributes, outputs)

    def contrib_outputs(
        self, op: str, outputs: int, *inputs: str, **attributes: Any
    ) -> tuple[str, ...]:
        """The same with so many outputs."""
        return self._append(op, inputs, _CONTRIB, attributes, outputs)

    def split(self, value: str, parts: int) -> list[str]:
        """So many equal parts along the last axis."""
        return list(self._append("Split", (value,), "", {"axis": -1, "num_outputs": parts}, parts))

    def choose(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """The value of `then` where the boolean scalar `condition` holds, else of `otherwise`.

        Both are called once to record their nodes; only one of them runs.
        """
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        return self._append("If", (condition,), "", branches)[0]

    def for_each(
        self,
        count: str,
        body: Callable[..., str | tuple[str, ...]],
        axis: int,
        carried: Sequence[str] = (),
    ) -> str:
        """What `body` gives for every index below the int64 scalar `count`, joined along `axis`.

        `body` is called once to record its nodes, with the index and the values that are carried
        from one round to the next, float32: it gives its part and what to carry on, which is
        `carried` at first.
        """
        going, done, joined = (f"{name}_{self._count}" for name in ("going", "done", "joined"))
        outer, self._nodes = self._nodes, []
        index = f"index_{self._count}"
        given = [f"carried_{self._count}_{at}" for at in range(len(carried))]
        results = body(index, *given)
        part, *kept = (results,) if isinstance(results, str) else results
        more = self.node("SequenceInsert", joined, part)
        kept = [self.node("Identity", one) for one in kept]
        still = self.node("Identity", going)
        inner, self._nodes = self._nodes, outer
        sequence = helper.make_sequence_type_proto(
            helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        )
        graph = helper.make_graph(
            inner,
            done,
            [
                helper.make_tensor_value_info(index, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                helper.make_value_info(joined, sequence),
                *(helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in given),
            ],
            [
                helper.make_tensor_value_info(still, TensorProto.BOOL, []),
                helper.make_value_info(more, sequence),
                *(helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in kept),
            ],
        )
        nothing = self.node("SequenceEmpty", dtype=TensorProto.FLOAT)
        inputs = (count, "", nothing, *carried)
        parts = self._append("Loop", inputs, "", {"body": graph}, 1 + len(carried))
        return self.node("ConcatFromSequence", parts[0], axis=axis)

    def rewrite(self, change: Callable[[Sequence[onnx.NodeProto]], list[onnx.NodeProto]]) -> None:
        """Put what `change` makes of the nodes in their place; weights nobody uses are dropped."""
        self._nodes = change(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        self._weights = {name: one for name, one in self._weights.items() if name in used}

    def __enter__(self) -> "Graph":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def save(self, path: Path) -> None:
        """Write the model file; raises `onnx.checker.ValidationError` on a malformed graph."""
        if self._file:
            self._file.close()
        onnx.checker.check_model(self._model(stored=False))
        onnx.save_model(self._model(stored=True), path)

    def _model(self, *, stored: bool) -> onnx.ModelProto:
        """The model; not `stored`: what lies in other files is an input, for a look at the rest."""
        weights = list(self._weights.values())
        inputs = list(self._inputs)
        if not stored:
            inputs += [
                helper.make_tensor_value_info(one.name, one.data_type, one.dims)
                for one in weights
                if one.data_location == TensorProto.EXTERNAL
            ]
            weights = [one for one in weights if one.data_location != TensorProto.EXTERNAL]
        graph = helper.make_graph(self._nodes, self.name, inputs, self._outputs, weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def _append(
        self, op: str, inputs: Sequence[str], domain: str, attributes: Any, outputs: int = 1
    ) -> tuple[str, ...]:
        self._count += 1
        name = f"{op}_{self._count}"
        names = (name, *(f"{name}_{at}" for at in range(1, outputs)))
        self._nodes.append(
            helper.make_node(op, inputs, names, name=name, domain=domain, **attributes)
        )
        return names

    def _branch(self, record: Callable[[], str]) -> onnx.GraphProto:
        outer, self._nodes = self._nodes, []
        result = record()
        inner, self._nodes = self._nodes, outer
        output = onnx.ValueInfoProto(name=result)
        output.type.tensor_type.elem_type = TensorProto.FLOAT
        return helper.make_graph(inner, result, [], [output])

    def _typed(self, value: NDArray[Any]) -> NDArray[Any]:
        """Float32 in the graph's own type, others as they are."""
        return value.astype(self._dtype, copy=False) if value.dtype == np.float32 else value

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(value, name)
        return name

    def _store(self, name: str, value: NDArray[Any]) -> onnx.TensorProto:
        if self._file is None or self._external is None:
            return numpy_helper.from_array(value, name)
        place = self._place(value.nbytes)
        self._file.write(_bytes(value))
        return _external(name, value.shape, helper.np_dtype_to_tensor_dtype(value.dtype), place)

    def _place(self, length: int) -> dict[str, str | int]:
        """Where the next so many bytes come to lie in the external file."""
        assert self._file
        assert self._external
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        return {"location": self._external.name, "offset": self._file.tell(), "length": length}


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, np.generic | np.ndarray):
        return np.asarray(value)
    return np.asarray(value, np.float32 if isinstance(value, float) else np.int64)


def _bytes(value: NDArray[Any]) -> memoryview:
    """What a file's `write` takes; bfloat16 is no type that a buffer can have."""
    return value.reshape(-1).view(np.uint8).data


def _external(
    name: str, shape: Sequence[int], dtype: int, location: Mapping[str, str | int]
) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, entry in location.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor
