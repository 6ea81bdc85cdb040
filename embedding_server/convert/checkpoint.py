"""The weights of a model: one or several safetensors files, tensors by name, as float32."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy, and so safetensors, knows bfloat16
import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embedding_server.convert.errors import ConvertError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PROGRESS_SECONDS = 1.0

log = structlog.get_logger()


class Checkpoint:
    """A context manager; called with a tensor's name it reads that tensor.

    Args:
        directory: holds `model.safetensors`, or its index and shards.
        prefix: what names may begin with, such as `bert.` where a model has a task's head.

    Raises:
        ConvertError: a file is missing or damaged.
    """

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._files = weight_files(directory)
        self._prefix = prefix
        self._stack = contextlib.ExitStack()
        self._tensors: dict[str, tuple[Any, str]] = {}
        self._total = sum(path.stat().st_size for path in self._files)
        self._done, self._shown = 0, time.monotonic()

    def __enter__(self) -> "Checkpoint":
        with _explained(self._files):
            for path in self._files:
                file = self._stack.enter_context(safe_open(path, framework="numpy"))
                for name in file.keys():  # noqa: SIM118 - no dict
                    self._tensors[name.removeprefix(self._prefix)] = file, name
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
        if name not in self._tensors:
            raise ConvertError(f"{self._files[0]} has no tensor {name}")
        file, full = self._tensors[name]
        with _explained(self._files):
            tensor: NDArray[Any] = file.get_tensor(full)
        self._done += tensor.nbytes
        if time.monotonic() - self._shown > _PROGRESS_SECONDS:
            self._shown = time.monotonic()
            log.info("graph.building", percent=round(100 * self._done / self._total))
        return tensor.astype(np.float32, copy=False)


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


@contextlib.contextmanager
def _explained(files: list[Path]) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as exc:
        raise ConvertError(f"{files[0].name}: {exc}") from exc
