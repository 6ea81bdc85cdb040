"""What takes long, on threads of its own: loading a model, and letting go of one."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from embedding_server.core import ModelSpec
from embedding_server.serving.loader import LoadError
from embedding_server.serving.model import Model

T = TypeVar("T")


def release(models: list[Model | None]) -> None:
    """Let go of models, and give their memory back to the system where the C library can."""
    models.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


async def in_daemon_thread(function: Callable[[ModelSpec], T], spec: ModelSpec) -> T:
    """`function(spec)` on a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def work() -> None:
        try:
            result = function(spec)
            outcome = partial(future.set_result, result)
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is awaited
            error = exc if isinstance(exc, Exception) else LoadError(repr(exc))
            outcome = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await future
