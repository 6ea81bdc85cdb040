"""The weights of a model: one or several safetensors files, tensors by name, as float32."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes  # with it numpy, and so safetensors, knows bfloat16
import msgspec
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors import SafetensorError, safe_open

from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Place
from embedding_server.convert.progress import Logged, Progress
from embedding_server.core import Precision

HALVES: Mapping[Precision, Any] = {
    Precision.FP16: np.float16,
    Precision.BF16: ml_dtypes.bfloat16,
}
_STORED = {"F16": Precision.FP16, "BF16": Precision.BF16, "F32": Precision.FP32}
_TYPES = {
    Precision.FP32: TensorProto.FLOAT,
    Precision.FP16: TensorProto.FLOAT16,
    Precision.BF16: TensorProto.BFLOAT16,
}
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_LARGE_BYTES = 1 << 16
"""Smaller tensors are copied: a page of memory per tensor is dearer."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Reading(msgspec.Struct, frozen=True):
    """How a checkpoint is read.

    Numbers are `rounded` to that precision, fp32 keeps what they are. `held`: what the graph holds
    them in, so that those which are stored so can be used where they lie. `progress` is told how
    far it is, None: the log is.
    """

    rounded: Precision = Precision.FP32
    progress: Progress | None = None
    held: Precision = Precision.FP32


class Checkpoint:
    """A context manager; called with a tensor's name it reads that tensor.

    Args:
        directory: holds `model.safetensors`, or its index and shards.
        prefix: what names may begin with, such as `bert.` where a model has a task's head.
        reading: see there.

    Raises:
        ConvertError: a file is missing or damaged.
    """

    def __init__(self, directory: Path, prefix: str = "", reading: Reading | None = None) -> None:
        self._files = weight_files(directory)
        self._prefix = prefix
        reading = reading or Reading()
        self._rounded = HALVES.get(reading.rounded)
        self._as_it_is = reading.held if reading.held is reading.rounded else None
        self._stack = contextlib.ExitStack()
        self._tensors: dict[str, _Tensor] = {}
        self._total = sum(path.stat().st_size for path in self._files)
        self._done, self._progress = 0, reading.progress or Logged()
        self._counting = threading.Lock()

    def __enter__(self) -> "Checkpoint":
        with _explained(self._files), contextlib.ExitStack() as stack:
            for index, path in enumerate(self._files):
                file = stack.enter_context(safe_open(path, framework="numpy"))
                header, start = _header(path)
                for name in file.keys():  # noqa: SIM118 - no dict
                    first, last = header[name]["data_offsets"]
                    shape, stored = header[name]["shape"], _STORED.get(header[name]["dtype"])
                    place = None
                    if stored and stored is self._as_it_is and last - first >= _LARGE_BYTES:
                        place = Place(
                            borrowed_name(index), start + first, last - first, shape, _TYPES[stored]
                        )
                    self._tensors[self._called(name)] = _Tensor(file, name, shape, place)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __call__(self, name: str) -> NDArray[Any]:
        """The tensor of that name; raises `ConvertError`."""
        found = self._find(name)
        with _explained(self._files):
            return self._counted(found.file.get_tensor(found.name))

    def shape(self, name: str) -> list[int]:
        """A tensor's; raises `ConvertError`."""
        return self._find(name).shape

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Some rows of a tensor; any thread may ask for them. Raises `ConvertError`."""
        found = self._find(name)
        with _explained(self._files):
            return self._counted(found.file.get_slice(found.name)[start:stop])

    def _counted(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """What was read, as float32."""
        with self._counting:
            self._done += tensor.nbytes
            self._progress(min(1.0, self._done / self._total))
        if self._rounded:
            tensor = tensor.astype(self._rounded)
        return tensor.astype(np.float32, copy=False)

    def _called(self, name: str) -> str:
        """A tensor's name as families know it; old checkpoints came from TensorFlow."""
        name = name.removeprefix(self._prefix)
        for old, new in _OLD_NAMES.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name

    def place(self, name: str) -> Place | None:
        """Where a large tensor lies as it is to be held; None for all others."""
        return self._find(name).place

    def _find(self, name: str) -> "_Tensor":
        if name not in self._tensors:
            raise ConvertError(f"{self._files[0].name} has no tensor {name}")
        return self._tensors[name]


class _Tensor(NamedTuple):
    """A tensor of an open file, and where it lies, if it can be used as it is."""

    file: Any
    name: str
    shape: list[int]
    place: Place | None


def borrowed_name(index: int) -> str:
    """What a checkpoint's file is called beside a graph that uses it as it is."""
    return f"weights-{index}"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        ConvertError: there are none, or the index cannot be read or leaves the directory.
    """
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() or not index.exists():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ConvertError(f"{index}: {exc}") from exc
    files = [directory / str(name) for name in names]
    for path in files:
        if path.parent != directory or not path.exists():
            raise ConvertError(f"{index} names {path.name}, which is not beside it")
    return files


def stored_precision(directory: Path) -> Precision | None:
    """What most of a model's numbers are stored in; None where that is none of ours.

    Raises:
        ConvertError: the weights cannot be read.
    """
    sizes: Counter[str] = Counter()
    files = weight_files(directory)
    with _explained(files):
        for path in files:
            for name, entry in _header(path)[0].items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    sizes[entry["dtype"]] += last - first
    return _STORED.get(sizes.most_common(1)[0][0]) if sizes else None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> type, shape and place of each tensor, and where the first one begins.

    The file begins with the length of this header, 8 bytes, and then the header, JSON.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"no safetensors file: its header would have {length} bytes")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise TypeError("no safetensors file: its header is no object")
        return header, 8 + length


@contextlib.contextmanager
def _explained(files: list[Path]) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
        raise ConvertError(f"{files[0].name}: {exc}") from exc
