"""What takes long, on threads of its own: loading a model, and letting go of one."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

from embedding_server.core import ModelSpec
from embedding_server.serving.loader import LoadError
from embedding_server.serving.model import Model

T = TypeVar("T")
Calling = Callable[[], AbstractContextManager[None]]
"""Waits until CUDA may be called: `Calls.shared`."""


def release(models: list[Model | None], calling: Calling) -> None:
    """Let go of models, and give their memory back to the system where the C library can."""
    with calling():
        models.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


async def in_daemon_thread(function: Callable[[ModelSpec], T], spec: ModelSpec) -> T:
    """`function(spec)` on a thread of its own, which does not keep the process from ending.

    What it raises is taken out of all that the frames in its traceback hold: see `Run.execute`.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(function(spec))
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is awaited
            errors.append(exc if isinstance(exc, Exception) else LoadError(repr(exc)))
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, name="load", daemon=True).start()
    await done.wait()
    if errors:
        raise errors.pop()
    return results.pop()
