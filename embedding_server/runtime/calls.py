"""Who may call CUDA: many at once, or one alone, while it captures a graph.

A capture forbids every thread of the process what could break it, to allocate and to free above
all: such calls fail, and the capture with them (`cudaStreamCaptureModeGlobal` in CUDA's runtime
API, which ONNX Runtime uses). Whoever wants to be alone waits for what is under way, however long a
session takes to open, and others wait for it; a capture itself takes milliseconds.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Calls:
    """Those of sessions that share GPUs; called from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._waiting = 0

    def __repr__(self) -> str:
        return f"Calls(running={self._running}, waiting={self._waiting})"

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others, unless somebody waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """As soon as nobody else is there."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._running)
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()
