"""One model on several GPUs, as one session: a batch goes where the fewest tokens are running."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from embedding_server.core import Item, Precision, Vectors
from embedding_server.runtime.session import Session, Stop


class Replicas:
    """A `Session` over several of the same graph.

    Args:
        sessions: one per device.
    """

    has_wide = False

    def __init__(self, sessions: Sequence[Session]) -> None:
        first, *_ = self._sessions = sessions
        self.provider, self.threads, self.padded = first.provider, first.threads, first.padded
        exact = Precision.FP32
        self.precision = next((one.precision for one in sessions if one.precision != exact), exact)
        """The least exact: of an older device and a newer one it is TF32."""
        self.resident_bytes = sum(one.resident_bytes for one in sessions)
        self.costs_above = max(one.costs_above for one in sessions)
        self._running = [0] * len(sessions)
        """Tokens of each, padding and all."""
        self._done = [0] * len(sessions)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Replicas(running={self._running})"

    def run(
        self, items: Sequence[Item], *, wide: bool = False, stop: Stop | None = None
    ) -> Vectors:
        """See `Session`; called from several threads."""
        lengths = [len(item) for item in items]
        tokens = len(lengths) * max(lengths) if self.padded else sum(lengths)
        with self._taken(tokens) as session:
            return session.run(items, wide=wide, stop=stop)

    def sample(self, tokens: int) -> Item:
        """See `Session`."""
        return self._sessions[0].sample(tokens)

    @contextmanager
    def _taken(self, tokens: int) -> Iterator[Session]:
        """The session with the fewest tokens, and of several the one that has had the fewest."""
        with self._lock:
            loads = zip(self._running, self._done, strict=True)
            index = min(enumerate(loads), key=lambda one: one[1])[0]
            self._running[index] += tokens
            self._done[index] += tokens
        try:
            yield self._sessions[index]
        finally:
            with self._lock:
                self._running[index] -= tokens
