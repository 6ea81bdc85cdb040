"""Stand-ins that implement our Protocols and do as they are told."""

import threading
from collections.abc import Sequence

import numpy as np

from embedding_server.core import Ids, Precision, Rows
from embedding_server.runtime.session import SessionError, Stop, Threads

WIDTH = 4


class FakeSession:
    """A session whose rows are the text's length, first and last id, and 1.

    `block()` makes runs wait until `release()`. A text that holds id `poison` fails its run, one
    that holds `nan` gets a row that is not finite, one that holds `deadly` ends the thread.
    """

    provider = "FakeExecutionProvider"
    precision = Precision.FP32
    padded = False
    resident_bytes = 1
    has_wide = True

    def __init__(
        self,
        *,
        poison: int = -1,
        nan: int = -1,
        deadly: int = -1,
        width: int = WIDTH,
        threads: int = 1,
    ) -> None:
        self.threads = Threads(threads)
        self.poison, self.nan, self.deadly = poison, nan, deadly
        self.width = width
        self.batches: list[list[int]] = []
        """Lengths of the texts of every run so far."""
        self.wide: list[bool] = []
        """Whether each of them was wide."""
        self.running = threading.Semaphore(0)
        """One release per run that has started."""
        self._open = True
        self._gate = threading.Semaphore(0)

    def block(self) -> None:
        """Make runs wait from now on."""
        self._open = False

    def release_one(self) -> None:
        """Let one waiting run go on."""
        self._gate.release()

    def release(self) -> None:
        """Let the waiting runs go on, and those to come."""
        self._open = True
        self._gate.release(100)

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`; a waiting run can be stopped."""
        self.batches.append([len(ids) for ids in texts])
        self.wide.append(wide)
        self.running.release()
        for _ in range(1000):
            if self._open or self._gate.acquire(timeout=0.01):
                break
            if stop and stop.called:
                raise SessionError("stopped")
        if any(self.poison in ids for ids in texts):
            raise ValueError("poisoned")
        if any(self.deadly in ids for ids in texts):
            raise SystemExit
        rows = np.zeros((len(texts), self.width), np.float32)
        rows[:, :WIDTH] = [(len(ids), ids[0], ids[-1], 1) for ids in texts]
        rows[[self.nan in ids for ids in texts]] = np.nan
        return rows


def ids(length: int, first: int = 0) -> Ids:
    """`length` ids counting up from `first`."""
    return np.arange(first, first + length, dtype=np.int64)
