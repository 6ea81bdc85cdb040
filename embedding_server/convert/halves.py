"""Exported graphs of float32 in fp16, for CUDA: cached by what their files hold.

Sums over many numbers, squares and roots stay in fp32, with all that lies between them; so do
inputs and outputs. Layer norms that are spelt out become `LayerNormalization`, whose kernel and
whose softmax's, too, add up in fp32 by themselves.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from embedding_server.convert.build import MODEL_FILE, cached
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.files import beside, loaded
from embedding_server.convert.hashes import content_hash
from embedding_server.convert.norms import joined

_VERSION = 1
_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_LARGEST = 30_000.0
"""What stands for never in a mask is more; twice this is still a number."""
_LARGE_TENSOR = 1024
"""Numbers; what is larger is left out where only types are looked for."""
# fmt: off
_EXACT = frozenset(
    {
        "Pow", "Sqrt", "Exp", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2",
        "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp", "LogSoftmax", "CumSum", "Range",
        "Resize", "Upsample", "RandomNormal", "RandomUniform", "NonMaxSuppression",
        "InstanceNormalization", "LpNormalization",
    }
)
"""Operators that stay in fp32."""
_BETWEEN = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Clip", "Unsqueeze", "Squeeze",
        "Expand", "Reshape", "Cast", "Identity",
    }
)
# fmt: on
"""Those that do where they lie between such ones, or between one and an output."""
_INTEGER = ("QuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")


def halved(path: Path, cache: Path) -> Path:
    """The graph at `path` in fp16, with the same inputs and outputs, made on first use.

    Args:
        path: an ONNX file of float32.
        cache: it is kept in `<cache>/graphs/<content hash>/`.

    Raises:
        ConvertError: it cannot be read, computes in whole numbers already, or has branches.
    """
    files = [path, *beside(path)]
    recipe = f"halves {_VERSION} {[content_hash(file, cache) for file in files]}"

    def build(out: Path) -> None:
        model = in_half(loaded(path))
        onnx.save_model(
            model, out / MODEL_FILE, save_as_external_data=True, location=f"{MODEL_FILE}_data"
        )

    return cached(cache, recipe, build)


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in fp16, in its place; raises `ConvertError` as `halved` does."""
    graph = model.graph
    for node in graph.node:
        if any(one.type == onnx.AttributeProto.GRAPH for one in node.attribute):
            raise ConvertError(f"a graph with branches ({node.op_type}) stays in fp32")
        if any(word in node.op_type for word in _INTEGER):
            raise ConvertError(f"a graph with {node.op_type} is not of fp32")
    _constants_stored(graph)
    floats = _floats(model)
    joined(graph)
    _Halving(graph, floats).apply()
    del graph.value_info[:]
    return model


def _constants_stored(graph: onnx.GraphProto) -> None:
    """Constant nodes as initializers."""
    for node in [one for one in graph.node if one.op_type == "Constant"]:
        value = helper.get_node_attr_value(node, node.attribute[0].name)
        tensor = value if isinstance(value, TensorProto) else _tensor(value)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _tensor(value: object) -> TensorProto:
    array = np.array(value)
    narrow = {"f": np.float32, "i": np.int64}.get(array.dtype.kind)
    return numpy_helper.from_array(array.astype(narrow) if narrow else array)


def _floats(model: onnx.ModelProto) -> set[str]:
    """Names of all values that are float32."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    large = [one for one in small.graph.initializer if np.prod(one.dims) > _LARGE_TENSOR]
    for one in large:
        declared = helper.make_tensor_value_info(one.name, one.data_type, one.dims)
        small.graph.input.append(declared)
        small.graph.initializer.remove(one)
    graph = onnx.shape_inference.infer_shapes(small).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {one.name: one.type.tensor_type.elem_type for one in values}
    types |= {one.name: one.data_type for one in graph.initializer}
    for node in graph.node:
        # What onnx does not know is ONNX Runtime's own, and computes in what it is given.
        given = next((types[name] for name in node.input if types.get(name)), 0)
        for name in node.output:
            if not types.get(name):
                types[name] = given
    return {name for name, dtype in types.items() if dtype == _FLOAT}


class _Halving:
    """A graph on its way to fp16: which nodes are exact, and what needs casting for the others."""

    def __init__(self, graph: onnx.GraphProto, floats: set[str]) -> None:
        self._graph, self._floats = graph, floats
        self._stored = {one.name: one for one in graph.initializer}
        self._exact_nodes = self._exact()
        self._exact_values = {one.name for one in graph.input} | {
            name for index in self._exact_nodes for name in graph.node[index].output
        }
        self._cast: dict[tuple[str, int], str] = {}

    def apply(self) -> None:
        """Rewrite the graph."""
        graph, nodes = self._graph, list(self._graph.node)
        outputs = {one.name for one in graph.output} & self._floats
        ends = {name: f"{name}_half" for name in outputs - self._exact_values}
        done: list[NodeProto] = []
        for index, node in enumerate(nodes):
            exact = index in self._exact_nodes
            for at, name in enumerate(node.input):
                if name in self._floats:
                    value, casts = self._given(ends.get(name, name), name, exact)
                    done += casts
                    node.input[at] = value
            if not exact:
                self._narrow(node)
                node.output[:] = [ends.get(name, name) for name in node.output]
            done.append(node)
        done += [helper.make_node("Cast", [half], [name], to=_FLOAT) for name, half in ends.items()]
        del graph.node[:]
        graph.node.extend(done)
        used = {name for node in done for name in node.input} | outputs
        kept = [one for one in graph.initializer if one.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _exact(self) -> set[int]:
        """Indices of the nodes that stay in fp32."""
        nodes = self._graph.node
        users = defaultdict(list)
        for index, node in enumerate(nodes):
            for name in node.input:
                users[name].append(index)
        makers = {name: index for index, node in enumerate(nodes) for name in node.output}
        ends = {one.name for one in self._graph.output}
        exact = {i for i, node in enumerate(nodes) if node.op_type in _EXACT and self._is(node)}

        def between(index: int) -> bool:
            made = {
                makers[name]
                for name in nodes[index].input
                if name in makers and name in self._floats
            }
            after = {user for name in nodes[index].output for user in users[name]}
            last = any(name in ends for name in nodes[index].output)
            return bool(made) and made <= exact | some and (last or bool(after & (exact | some)))

        some = {i for i, node in enumerate(nodes) if node.op_type in _BETWEEN and self._is(node)}
        some -= exact
        while out := {index for index in some if not between(index)}:
            some -= out
        return exact | some

    def _is(self, node: NodeProto) -> bool:
        """Whether it gives float32."""
        return any(name in self._floats for name in node.output)

    def _given(self, value: str, name: str, exact: bool) -> tuple[str, list[NodeProto]]:  # noqa: FBT001 - one of two kinds
        """An input as such a node takes it, and the cast for it, if it is the first to need one."""
        wanted = _FLOAT if exact else _HALF
        if name in self._stored:
            return (name if exact else self._half_of(name)), []
        if (name in self._exact_values) == exact:
            return value, []
        key = (name, wanted)
        if key in self._cast:
            return self._cast[key], []
        self._cast[key] = f"{name}_as_{'single' if exact else 'half'}"
        return self._cast[key], [helper.make_node("Cast", [value], [self._cast[key]], to=wanted)]

    def _half_of(self, name: str) -> str:
        """A stored tensor in fp16."""
        half = f"{name}_in_half"
        if half not in self._stored:
            tensor = numpy_helper.from_array(_narrowed(self._stored[name]), half)
            self._stored[half] = tensor
            self._graph.initializer.append(tensor)
        return half

    def _narrow(self, node: NodeProto) -> None:
        """What a node says of its output's type."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                attribute.i = _HALF
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(_narrowed(attribute.t)))


def _narrowed(tensor: TensorProto) -> NDArray[np.float16]:
    bounded = np.clip(numpy_helper.to_array(tensor), -_LARGEST, _LARGEST)
    return np.asarray(bounded, np.float16)
