"""The gate before the model: bounded work inside, a bounded line before it.

What is inside is limited by predicted work, so that the schedule always has enough to choose from
and never much more, or by `INFERENCE_MAX_CONCURRENT_REQUESTS` where that is set. Everyone else
waits in line, first come first served, or is refused with a time after which to come back. Small
requests have a limit of their own and do not stand behind bulk, so that they reach the schedule,
which lets them go first; the length of the line is one number for all.
"""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable

from embedding_server.errors import ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.schedule import Lane

_SMOOTHING = 0.05


class _Waiter:
    def __init__(self, work: float) -> None:
        self.work = work
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Gate:
    """One lane: who is inside and who waits, as numbers and seconds of work."""

    def __init__(self) -> None:
        self.line: OrderedDict[_Waiter, None] = OrderedDict()
        self.line_work = 0.0
        self.inside = 0
        self.inside_work = 0.0

    @property
    def work(self) -> float:
        return self.line_work + self.inside_work

    def enter(self, work: float) -> None:
        self.inside += 1
        self.inside_work += work

    def leave(self, work: float) -> None:
        self.inside -= 1
        self.inside_work = self.inside_work - work if self.inside else 0.0

    def queue(self, waiter: _Waiter) -> None:
        self.line[waiter] = None
        self.line_work += waiter.work

    def drop(self, waiter: _Waiter) -> None:
        del self.line[waiter]
        self.line_work = self.line_work - waiter.work if self.line else 0.0


class Permit:
    """A place inside, given back at the end of its `with` block."""

    def __init__(self, queue: "AdmissionQueue", gate: _Gate, work: float) -> None:
        self._queue, self._gate, self._work = queue, gate, work

    def __enter__(self) -> None:
        """The place was taken when the permit was given."""

    def __exit__(self, *_: object) -> None:
        self._queue.leave(self._gate, self._work)


class AdmissionQueue:
    """The gate of one device.

    Args:
        max_requests: requests inside at once; None limits by `max_work` instead.
        max_work: work of a lane inside at once, seconds of one core; one request always fits.
        max_depth: requests in line.
        timeout: longest wait in line, seconds.
        cores: each drains a second of work per second.
    """

    def __init__(
        self,
        *,
        max_requests: int | None,
        max_work: Callable[[], float],
        max_depth: int,
        timeout: float,
        cores: int,
        metrics: Metrics,
    ) -> None:
        self.max_depth = max_depth
        self.draining = False
        """While true every new request is refused."""
        self._max_requests, self._max_work = max_requests, max_work
        self._timeout = timeout
        self._cores = cores
        self._metrics = metrics
        self._gates = {lane: _Gate() for lane in Lane}
        self._typical_work = 0.01
        metrics.queue_depth.set_function(lambda: self.depth)
        metrics.admitted_requests.set_function(lambda: self._inside)
        metrics.admitted_work.set_function(
            lambda: sum(gate.inside_work for gate in self._gates.values())
        )

    def __repr__(self) -> str:
        work = sum(gate.work for gate in self._gates.values())
        return f"AdmissionQueue(inside={self._inside}, waiting={self.depth}, work={work:.3f})"

    @property
    def depth(self) -> int:
        """Requests in line."""
        return sum(len(gate.line) for gate in self._gates.values())

    @property
    def permits(self) -> int:
        """How many more requests would be admitted at once, typical ones where work counts."""
        bulk = self._gates[Lane.BULK]
        if bulk.line:
            return 0
        if self._max_requests is not None:
            return self._max_requests - self._inside
        return max(0, int((self._max_work() - bulk.inside_work) // self._typical_work))

    @property
    def estimated_wait(self) -> float:
        """Seconds that a bulk request arriving now would wait in line."""
        return self._wait_of(self._gates[Lane.BULK])

    @property
    def retry_after(self) -> float:
        """Seconds after which all present work is done, with jitter."""
        drained = sum(gate.work for gate in self._gates.values()) / self._cores
        jitter = random.uniform(1.0, 1.25)  # noqa: S311 - spreads clients, guards nothing
        return drained * jitter

    async def permit(self, work: float, lane: Lane) -> Permit:
        """Wait for a place inside: `with await queue.permit(...)` holds it.

        Args:
            work: the request's predicted cost, seconds of one core.
            lane: whose limit and line it has; all share one where requests are counted.

        Raises:
            ServiceUnavailable: draining, the line is full, or the wait is or was too long.
        """
        gate = self._gates[lane if self._max_requests is None else Lane.BULK]
        started = time.monotonic()
        try:
            if self.draining:
                raise self.refusal("draining", "the server is shutting down")
            if gate.line or not self._fits(gate):
                await self._wait(gate, work)
            else:
                gate.enter(work)
        finally:
            self._metrics.queue_wait.observe(time.monotonic() - started)
        self._typical_work += _SMOOTHING * (work - self._typical_work)
        return Permit(self, gate, work)

    def refusal(self, reason: str, message: str) -> ServiceUnavailable:
        """A counted 503 that says when to come back."""
        self._metrics.rejections.labels(reason).inc()
        return ServiceUnavailable(message, reason=reason, retry_after=self.retry_after)

    @property
    def _inside(self) -> int:
        return sum(gate.inside for gate in self._gates.values())

    async def _wait(self, gate: _Gate, work: float) -> None:
        if self.depth >= self.max_depth:
            raise self.refusal("queue_full", f"{self.max_depth} requests are waiting already")
        if (wait := self._wait_of(gate)) > self._timeout:
            raise self.refusal(
                "wait_too_long", f"the wait would be {wait:.1f} s, which is too long"
            )
        waiter = _Waiter(work)
        gate.queue(waiter)
        try:
            async with asyncio.timeout(self._timeout):
                await waiter.admitted
        except BaseException as exc:
            if waiter in gate.line:
                gate.drop(waiter)
            elif not waiter.admitted.cancelled():
                self.leave(gate, work)
            if isinstance(exc, TimeoutError):
                raise self.refusal(
                    "queue_timeout", f"no place became free within {self._timeout:g} s"
                ) from exc
            raise

    def _wait_of(self, gate: _Gate) -> float:
        """Seconds until what is in line and what is over the limit have drained."""
        if not gate.line and self._fits(gate):
            return 0.0
        excess = gate.line_work
        if self._max_requests is None:
            excess += max(0.0, gate.inside_work - self._max_work())
        return excess / self._cores

    def _fits(self, gate: _Gate) -> bool:
        if self._max_requests is not None:
            return self._inside < self._max_requests
        return gate.inside == 0 or gate.inside_work < self._max_work()

    def leave(self, gate: _Gate, work: float) -> None:
        """Give a place back, to those in line."""
        gate.leave(work)
        while gate.line and self._fits(gate):
            waiter = next(iter(gate.line))
            gate.drop(waiter)
            if not waiter.admitted.done():
                gate.enter(waiter.work)
                waiter.admitted.set_result(None)
