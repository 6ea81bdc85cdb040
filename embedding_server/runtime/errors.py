"""What goes wrong in a session: ONNX Runtime's exceptions share no base class, these do.

SessionError          the graph could not be opened, or failed on a batch
└── DeviceError       the reason is the device, not the graph
    ├── OutOfMemoryError  it has no room for this batch; a smaller one may do
    ├── DeviceLostError   the GPU will not work again for this process
    └── FellBackError     ONNX Runtime opened the graph with another provider than asked for
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "BFCArena")
"""What ONNX Runtime's errors say where memory ran out."""
_NO_DEVICE = re.compile(r"CUDA failure (214|220|226|700|702|709|71[04-9]|721|810|911)\b")
"""CUDA's errors after which every further call fails: uncorrectable bits, a context that is gone,
and those of which CUDA says that the process must be terminated and relaunched (driver_types.h,
cudaError)."""


class SessionError(Exception):
    """The graph could not be opened, or failed on a batch; the message is for the log."""


class DeviceError(SessionError):
    """The reason is the device, not the graph."""


class OutOfMemoryError(DeviceError):
    """The device has no room for this batch; a smaller one may do."""


class DeviceLostError(DeviceError):
    """The GPU will not work again for this process."""


class FellBackError(DeviceError):
    """ONNX Runtime opened the graph with another provider than it was asked for."""


@contextmanager
def translated(where: str = "") -> Iterator[None]:
    """Turn what ONNX Runtime raises into a `SessionError`; its message begins with `where`."""
    try:
        yield
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise _kind(exc)(where + str(exc)) from exc


def _kind(exc: Exception) -> type[SessionError]:
    if isinstance(exc, SessionError):
        return type(exc)
    if isinstance(exc, MemoryError) or any(words in str(exc) for words in _NO_MEMORY):
        return OutOfMemoryError
    return DeviceLostError if _NO_DEVICE.search(str(exc)) else SessionError
