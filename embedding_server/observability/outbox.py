"""What is to be sent: a bounded queue and the thread that empties it.

Whoever puts something in never waits; where the queue is full, its oldest goes. Of all that a
request has to tell there is one `put`: the SDK's own queues take spans one by one, which takes as
long as making them.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_log = logging.getLogger("opentelemetry.outbox")

_QUEUED, _BATCH, _DELAY_SECONDS = 4096, 512, 1.0


class Outbox:
    """Gives what it was given to `send`, at most `_BATCH` at a time, a second after the last time.

    Args:
        name: what the things are called, in complaints.
        send: may block and fail.
    """

    def __init__(self, name: str, send: Callable[[list[Any]], object]) -> None:
        self._send = send
        self._queue: deque[Any] = deque(maxlen=_QUEUED)
        self._woken, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Outbox {self._thread.name} queued={len(self._queue)}>"

    def put(self, items: Iterable[Any]) -> None:
        """Send these, too."""
        if len(self._queue) == _QUEUED:
            _log.warning("%s are lost: too many wait to be sent", self._thread.name)
        self._queue.extend(items)
        if len(self._queue) >= _BATCH:
            self._woken.set()

    def close(self, seconds: float) -> None:
        """Send what is left, for so long at most."""
        self._closing = True
        self._woken.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        closing = False
        while not closing:
            self._woken.wait(_DELAY_SECONDS)
            self._woken.clear()
            closing = self._closing
            while count := min(_BATCH, len(self._queue)):
                batch = [self._queue.popleft() for _ in range(count)]
                try:
                    self._send(batch)
                except Exception as exc:  # noqa: BLE001 - the thread's outermost loop
                    _log.error("%s are not sent: %s", self._thread.name, type(exc).__name__)
                if len(self._queue) < _BATCH and not closing:
                    break  # what came meanwhile is no batch yet
