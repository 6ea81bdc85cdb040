"""The memory of a device, and what it allows: growth is held back, use is not.

ONNX Runtime's arenas do not shrink, so a card that once had a peak looks full for ever. What ran
before will run again, however full the card looks; only what would need more than ever before is
measured against what is free.
"""

import threading
import time
from collections.abc import Sequence

import structlog

from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.errors import OutOfMemoryError
from embedding_server.runtime.memory import Monitor, MonitorError, Usage
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Session
from embedding_server.serving.tuning import batch

_POLL_SECONDS, _COMPLAIN_SECONDS = 0.5, 60.0
_HYSTERESIS_PERCENT = 5.0
_LEARNED_TOKENS, _LEAST_BYTES_PER_TOKEN = (512, 4096), 4096.0
"""An arena grows in steps: what could not be seen is assumed."""
_PROBE_AFTER_RUNS, _PROBE_FACTOR = 32, 1.25

log = structlog.get_logger()


class MemoryGate:
    """Free memory of a device below a threshold, polled on a thread of its own.

    Args:
        monitor: tells; None where there is no such device.
        threshold: percent in use from which nothing may grow, until it is 5 less.
    """

    def __init__(self, monitor: Monitor | None, threshold: float, metrics: Metrics) -> None:
        self._monitor = monitor
        self._threshold = threshold
        self._metrics = metrics
        self._usages: Sequence[Usage] = ()
        self.devices = 1
        """How many there are, as far as is known."""
        self.tight = False
        """Whether nothing may grow."""
        self._taken = self._taken_before = 0.0
        """Bytes, since the last reading and the one before: what was taken shows late."""
        self._complained = -_COMPLAIN_SECONDS
        self._stopped = threading.Event()
        metrics.memory_tight.set_function(lambda: self.tight)

    def __repr__(self) -> str:
        return f"MemoryGate({self.pressure:.1f} %, tight={self.tight})"

    @property
    def pressure(self) -> float:
        """Percent in use on the fullest device; 0 where there is none."""
        return max((usage.percent for usage in self._usages), default=0.0)

    @property
    def free(self) -> float | None:
        """Bytes that may be taken before the threshold; None where that is not known."""
        if not self._usages:
            return None
        if self.tight:
            return 0.0
        free = min(usage.total * self._threshold / 100 - usage.used for usage in self._usages)
        return max(0.0, free - self._taken - self._taken_before)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(usage.used for usage in self._usages)

    def take(self, size: float) -> None:
        """So many bytes are going to be used, which the next reading will show."""
        self._taken += size

    def start(self) -> None:
        """Read once, then go on reading in the background."""
        if self._monitor:
            self.poll()
            threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def stop(self) -> None:
        """Read no more."""
        self._stopped.set()

    def poll(self) -> None:
        """Read once."""
        assert self._monitor
        try:
            self._taken, self._taken_before = 0.0, self._taken
            self._usages = self._monitor.read()
            self.devices = max(1, len(self._usages))
        except MonitorError as exc:
            self._usages, self.tight = (), False
            if time.monotonic() - self._complained >= _COMPLAIN_SECONDS:
                self._complained = time.monotonic()
                log.warning("memory.unknown", error=str(exc))
            return
        limit = self._threshold - _HYSTERESIS_PERCENT * self.tight
        self.tight = self.pressure >= limit
        for usage in self._usages:
            self._metrics.record_memory(usage.device, usage.used, usage.total, usage.busy)

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            self.poll()


class Ceiling:
    """How many tokens of one model may run at once on a device, by memory.

    A model's arena on a device holds what its batches there need together. On several devices a
    batch goes where the fewest tokens run: beside the average, about, or less.

    Args:
        memory: what is free.
    """

    def __init__(self, memory: MemoryGate) -> None:
        self._memory = memory
        self._bytes_per_token = 0.0
        """What one more token in a batch takes; 0 where memory does not matter."""
        self._limit: float | None = None
        """After memory ran out: what is tried from then on, more and more again."""
        self._good_runs = 0
        self._running = 0
        """Tokens, on all devices."""
        self.high_water = 0
        """Tokens of the largest batch that ran."""
        self._together = 0
        """Tokens that ran at once on one device, batches beside one another: they are ours, too."""

    def __repr__(self) -> str:
        marks = f"high_water={self.high_water}, together={self._together}, limit={self._limit}"
        return f"Ceiling(running={self._running}, {marks})"

    def learn(self, session: Session, max_tokens: int) -> None:
        """See what a token takes of a GPU's memory, in two runs before anybody asks."""
        if session.provider == CPU or self._memory.free is None:
            return
        used = []
        for tokens in _LEARNED_TOKENS:
            try:
                for _ in range(self._memory.devices):  # one after another they go to each
                    session.run(batch(session, tokens, max_tokens))
            except OutOfMemoryError:
                self._cut(tokens)
                break
            self._largest(tokens)
            self._memory.poll()
            used.append(self._memory.used / self._memory.devices)
        few, many = _LEARNED_TOKENS
        grown = (used[-1] - used[0]) / (many - few) if used else 0.0
        self._bytes_per_token = max(_LEAST_BYTES_PER_TOKEN, grown)

    def starts(self, tokens: int) -> None:
        """A batch of so many tokens begins: what takes more than ever before is not free."""
        self._memory.take(max(0, tokens - self._spare) * self._bytes_per_token)
        self._running += tokens

    def stopped(self, tokens: int) -> None:
        """It is over, and says nothing about memory."""
        self._running -= tokens

    def room(self, tokens: int) -> int:
        """So many tokens of another batch, or as many as there is memory for beside what runs."""
        free = self._memory.free
        if not (self._running and self._bytes_per_token) or free is None:
            return tokens
        return min(tokens, self._spare + int(free / self._bytes_per_token))

    @property
    def _spare(self) -> int:
        """Tokens that are ours, where the fewest run."""
        return max(0, self._together - self._running // self._memory.devices)

    def allowed(self, tokens: int) -> int:
        """So many tokens, or as many as there is memory for; 1 at least."""
        if self._limit is not None:
            tokens = min(tokens, int(self._limit))
        free = self._memory.free
        if self._bytes_per_token and free is not None:
            tokens = min(tokens, self.high_water + int(free / self._bytes_per_token))
        return max(1, tokens)

    def holds_back(self, tokens: int) -> bool:
        """Whether a text of so many tokens has to wait for memory."""
        grows = bool(self._bytes_per_token) and tokens > self.high_water
        return grows and self._memory.tight

    def ran(self, tokens: int) -> None:
        """A batch of so many tokens went well, and so did what ran beside it so far."""
        self._largest(tokens)
        self._together = max(self._together, self._running // self._memory.devices)
        self.stopped(tokens)
        if self._limit is None:
            return
        self._good_runs += 1
        if self._good_runs >= _PROBE_AFTER_RUNS:
            self._good_runs, self._limit = 0, _PROBE_FACTOR * self._limit

    def ran_out(self, tokens: int) -> None:
        """Memory did not suffice for a batch of so many tokens."""
        self.stopped(tokens)
        self._cut(tokens)

    def _largest(self, tokens: int) -> None:
        self.high_water = max(self.high_water, tokens)
        self._together = max(self._together, tokens)

    def _cut(self, tokens: int) -> None:
        self._limit, self._good_runs = max(1.0, tokens / 2), 0
        self.high_water = self._together = min(self.high_water, int(self._limit))
