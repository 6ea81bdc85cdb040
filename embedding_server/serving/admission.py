"""The gate before the model: a bounded number of requests inside, a bounded line before it.

What is inside is limited by work, so that the batcher always has enough to choose from and never
much more, or by `INFERENCE_MAX_CONCURRENT_REQUESTS` where that is set. Everyone else waits in
line, first come first served, or is refused with a time after which to come back.
"""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from embedding_server.errors import ServiceUnavailable
from embedding_server.observability.metrics import Metrics

_MIN_RETRY, _MAX_RETRY = 1.0, 60.0
_SMOOTHING = 0.05


class _Waiter:
    def __init__(self, work: float) -> None:
        self.work = work
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class AdmissionQueue:
    """The gate of one device.

    Args:
        max_requests: requests inside at once; None limits by `max_work` instead.
        max_work: work inside at once, seconds of one run slot; one request always fits.
        max_depth: requests in line.
        timeout: longest wait in line, seconds.
        slots: run slots, which drain a second of work per second each.
    """

    def __init__(
        self,
        *,
        max_requests: int | None,
        max_work: Callable[[], float],
        max_depth: int,
        timeout: float,
        slots: int,
        metrics: Metrics,
    ) -> None:
        self.max_depth = max_depth
        self.draining = False
        """While true every new request is refused."""
        self._max_requests, self._max_work = max_requests, max_work
        self._timeout = timeout
        self._slots = slots
        self._metrics = metrics
        self._line: OrderedDict[_Waiter, None] = OrderedDict()
        self._line_work = 0.0
        self._inside = 0
        self._inside_work = 0.0
        self._typical_work = 0.01
        metrics.queue_depth.set_function(lambda: self.depth)
        metrics.admitted_requests.set_function(lambda: self._inside)
        metrics.admitted_work.set_function(lambda: self._inside_work)

    def __repr__(self) -> str:
        return (
            f"AdmissionQueue(inside={self._inside}, inside_work={self._inside_work:.3f},"
            f" waiting={self.depth}, waiting_work={self._line_work:.3f})"
        )

    @property
    def depth(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def permits(self) -> int:
        """How many more requests would be admitted at once, typical ones where work counts."""
        if self._line:
            return 0
        if self._max_requests is not None:
            return self._max_requests - self._inside
        return max(0, int((self._max_work() - self._inside_work) // self._typical_work))

    @property
    def estimated_wait(self) -> float:
        """Seconds that a request arriving now would wait in line."""
        if not self._line and self._fits():
            return 0.0
        excess = self._line_work
        if self._max_requests is None:
            excess += max(0.0, self._inside_work - self._max_work())
        return excess / self._slots

    @property
    def retry_after(self) -> float:
        """Seconds after which all present work is done, with jitter, from 1 to 60."""
        drained = (self._inside_work + self._line_work) / self._slots
        jitter = random.uniform(1.0, 1.25)  # noqa: S311 - spreads clients, guards nothing
        return min(_MAX_RETRY, max(_MIN_RETRY, drained * jitter))

    @asynccontextmanager
    async def permit(self, work: float) -> AsyncIterator[None]:
        """Wait for a place inside and hold it.

        Args:
            work: the request's predicted cost, seconds of one run slot.

        Raises:
            ServiceUnavailable: draining, the line is full, or the wait is or was too long.
        """
        started = time.monotonic()
        try:
            if self._line or not self._fits():
                await self._wait(work)
            elif self.draining:
                raise self.refusal("draining", "the server is shutting down")
            else:
                self._enter(work)
        finally:
            self._metrics.queue_wait.observe(time.monotonic() - started)
        try:
            yield
        finally:
            self._leave(work)

    def refusal(self, reason: str, message: str) -> ServiceUnavailable:
        """A counted 503 that says when to come back."""
        self._metrics.rejections.labels(reason).inc()
        after = self.retry_after
        return ServiceUnavailable(
            f"{message}; try again in {after:.0f} s", reason=reason, retry_after=after
        )

    async def _wait(self, work: float) -> None:
        if self.draining:
            raise self.refusal("draining", "the server is shutting down")
        if len(self._line) >= self.max_depth:
            raise self.refusal("queue_full", f"{self.max_depth} requests are waiting already")
        if self.estimated_wait > self._timeout:
            raise self.refusal(
                "wait_too_long", f"the wait would be {self.estimated_wait:.1f} s, which is too long"
            )
        waiter = _Waiter(work)
        self._line[waiter] = None
        self._line_work += work
        try:
            async with asyncio.timeout(self._timeout):
                await waiter.admitted
        except BaseException as exc:
            if waiter in self._line:
                self._drop(waiter)
            elif not waiter.admitted.cancelled():
                self._leave(work)
            if isinstance(exc, TimeoutError):
                raise self.refusal(
                    "queue_timeout", f"no place became free within {self._timeout:g} s"
                ) from exc
            raise

    def _fits(self) -> bool:
        if self._max_requests is not None:
            return self._inside < self._max_requests
        return self._inside == 0 or self._inside_work < self._max_work()

    def _enter(self, work: float) -> None:
        self._inside += 1
        self._inside_work += work
        self._typical_work += _SMOOTHING * (work - self._typical_work)

    def _leave(self, work: float) -> None:
        self._inside -= 1
        self._inside_work = self._inside_work - work if self._inside else 0.0
        while self._line and self._fits():
            waiter = next(iter(self._line))
            self._drop(waiter)
            if not waiter.admitted.done():
                self._enter(waiter.work)
                waiter.admitted.set_result(None)

    def _drop(self, waiter: _Waiter) -> None:
        del self._line[waiter]
        self._line_work = self._line_work - waiter.work if self._line else 0.0
