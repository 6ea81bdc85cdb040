"""The gate before the model: bounded work inside, a bounded line before it.

What is inside is limited by predicted work, so that the schedule always has enough to choose from
and never much more, or by `INFERENCE_MAX_CONCURRENT_REQUESTS` where that is set. Everyone else
waits in line or is refused, with a time after which to come back. Small requests have a limit of
their own and do not stand behind bulk, so that they reach the schedule, which lets them go first.
Within a lane clients take turns, and each client's requests go first come first served; the length
of the line is one number for all, and a client that fills it makes room for others.
"""

import asyncio
import random
import time
from collections import Counter, OrderedDict

from embedding_server.errors import ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.cost import Work
from embedding_server.serving.forecast import Drain, Promises
from embedding_server.serving.schedule import Lane
from embedding_server.serving.shares import Shares

_SMOOTHING = 0.05
_CAUTION = 0.8
"""Part of the longest wait that a prediction may take up: what is let in is to be served in time,
though predictions are off by a fifth."""
_LEAST_WAIT = 1e-3
"""Seconds; shorter predictions are not judged by their ratio."""


class _Waiter:
    def __init__(self, work: Work, client: str) -> None:
        self.work = work
        self.client = client
        self.queued = self.granted = False
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class _Line:
    """One client's requests before a gate, oldest first."""

    def __init__(self) -> None:
        self.waiters: OrderedDict[_Waiter, None] = OrderedDict()
        self.seconds = 0.0


class _Gate:
    """One lane: who is inside and who waits, as numbers and predicted work."""

    def __init__(self, cores: int) -> None:
        self.lines: dict[str, _Line] = {}
        self.shares: Shares[str] = Shares()
        self.drain = Drain(float(cores))
        self.typical = Work(seconds=0.01, batches=0.1)
        self.depth = self.inside = 0
        self.inside_seconds = self.inside_batches = 0.0

    @property
    def seconds(self) -> float:
        """All work that is here."""
        return self.inside_seconds + sum(line.seconds for line in self.lines.values())

    def enter(self, work: Work) -> None:
        self.inside += 1
        self.inside_seconds += work.seconds
        self.inside_batches += work.batches

    def leave(self, work: Work) -> None:
        self.inside -= 1
        self.inside_seconds = self.inside_seconds - work.seconds if self.inside else 0.0
        self.inside_batches = self.inside_batches - work.batches if self.inside else 0.0

    def queue(self, waiter: _Waiter) -> None:
        if not self.depth:
            self.drain.begin()
        line = self.lines.setdefault(waiter.client, _Line())
        line.waiters[waiter] = None
        line.seconds += waiter.work.seconds
        self.shares.join(waiter.client)
        self.depth += 1
        waiter.queued = True

    def drop(self, waiter: _Waiter) -> None:
        line = self.lines[waiter.client]
        del line.waiters[waiter]
        line.seconds -= waiter.work.seconds
        self.depth -= 1
        waiter.queued = False
        if not line.waiters:
            del self.lines[waiter.client]
            self.shares.leave(waiter.client)

    def take(self) -> _Waiter:
        """Whose turn it is, out of line."""
        client = self.shares.next
        waiter = next(iter(self.lines[client].waiters))
        self.shares.charge(client, waiter.work.seconds)
        self.drop(waiter)
        return waiter

    def ahead(self, client: str, seconds: float) -> float:
        """Work in line that goes before new work of this client.

        While a client's line is served, every other one gets as much.
        """
        own = self.lines[client].seconds if client in self.lines else 0.0
        others = (line.seconds for name, line in self.lines.items() if name != client)
        return own + sum(min(other, own + seconds) for other in others)


class Permit:
    """A place inside, given back at the end of its `with` block."""

    def __init__(self, queue: "AdmissionQueue", gate: _Gate, work: Work) -> None:
        self._queue, self._gate, self._predicted, self._work = queue, gate, work, work
        self.waited = self.predicted_wait = 0.0
        """Seconds in line, and what was predicted for it."""

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.leave(self._gate, self._work, self._predicted)

    def correct(self, work: Work) -> None:
        """The request turned out to be so much work."""
        self._gate.enter(work)
        self._gate.leave(self._work)
        self._work = work


class AdmissionQueue:
    """The gate of one device.

    Args:
        max_requests: requests inside at once; None limits by `max_batches` instead.
        max_batches: work of a lane inside at once, in full batches; one request always fits.
        max_depth: requests in line.
        timeout: longest wait in line, seconds.
        cores: each is assumed to drain a second of work per second, until more is known.
    """

    def __init__(
        self,
        *,
        max_requests: int | None,
        max_batches: float,
        max_depth: int,
        timeout: float,
        cores: int,
        metrics: Metrics,
    ) -> None:
        self.max_depth = max_depth
        self.draining = False
        """While true every new request is refused."""
        self._max_requests, self._max_batches = max_requests, max_batches
        self._timeout = timeout
        self._cores = cores
        self._metrics = metrics
        self._gates = {lane: _Gate(cores) for lane in Lane}
        self._promises = Promises()
        metrics.queue_depth.set_function(lambda: self.depth)
        metrics.admitted_requests.set_function(lambda: self._inside)
        metrics.admitted_work.set_function(
            lambda: sum(gate.inside_seconds for gate in self._gates.values())
        )

    def __repr__(self) -> str:
        work = sum(gate.seconds for gate in self._gates.values())
        return f"AdmissionQueue(inside={self._inside}, waiting={self.depth}, work={work:.3f})"

    @property
    def depth(self) -> int:
        """Requests in line."""
        return sum(gate.depth for gate in self._gates.values())

    @property
    def permits(self) -> int:
        """How many more requests would be admitted at once, typical ones where work counts."""
        bulk = self._gates[Lane.BULK]
        if bulk.depth:
            return 0
        if self._max_requests is not None:
            return max(0, self._max_requests - self._inside)
        room = self._max_batches - bulk.inside_batches
        return max(0, int(room // bulk.typical.batches))

    def estimated_wait(self, client: str) -> float:
        """Seconds that a typical bulk request of this client would wait in line now."""
        bulk = self._gates[Lane.BULK]
        return self._wait_of(bulk, client, bulk.typical)

    async def permit(self, work: Work, lane: Lane, client: str) -> Permit:
        """Wait for a place inside: `with await queue.permit(...)` holds it.

        Args:
            work: the request's predicted cost.
            lane: whose limit and line it has; all share one where requests are counted.
            client: whose request it is; clients take turns.

        Raises:
            ServiceUnavailable: draining, the line is full, or the wait is or was too long.
        """
        gate = self._gate(lane)
        permit, started = Permit(self, gate, work), time.monotonic()
        try:
            if refusal := self.refused(lane, client, work):
                raise refusal
            if gate.depth or not self._fits(gate):
                permit.predicted_wait = self._wait_of(gate, client, work)
                await self._wait(gate, work, client)
            else:
                gate.enter(work)
        finally:
            permit.waited = time.monotonic() - started
            self._metrics.queue_wait.observe(permit.waited)
        if permit.predicted_wait:
            ratio = permit.waited / max(permit.predicted_wait, _LEAST_WAIT)
            self._metrics.queue_wait_ratio.observe(ratio)
        gate.typical = gate.typical.towards(work, _SMOOTHING)
        return permit

    def refused(
        self, lane: Lane, client: str, work: Work | None = None
    ) -> ServiceUnavailable | None:
        """The 503 that a request gets now, counted; None where it may go in or wait.

        No `work` stands for a typical request.
        """
        gate = self._gate(lane)
        work = work or gate.typical
        if self.draining:
            return self.refusal("draining", "the server is shutting down", work)
        if not gate.depth and self._fits(gate):
            return None
        if self.depth >= self.max_depth and self._crowder(client) is None:
            message = f"{self.max_depth} requests are waiting already"
            return self.refusal("queue_full", message, work)
        if (wait := self._wait_of(gate, client, work)) > _CAUTION * self._timeout:
            message = f"the wait would be {wait:.1f} s, which is too long"
            return self.refusal("wait_too_long", message, work)
        return None

    def refusal(self, reason: str, message: str, work: Work | None = None) -> ServiceUnavailable:
        """A counted 503 that says when to come back.

        That is when all work that is here, and all that was told to come back before, is done.
        """
        self._metrics.rejections.labels(reason).inc()
        gates = self._gates.values()
        rate = sum(gate.drain.rate for gate in gates if gate.depth) or self._cores
        seconds = (sum(gate.seconds for gate in gates) + self._promises.work) / rate
        jitter = random.uniform(1.0, 1.25)  # noqa: S311 - spreads clients, guards nothing
        refusal = ServiceUnavailable(message, reason=reason, retry_after=seconds * jitter)
        if work:
            self._promises.add(work.seconds, refusal.retry_after)
        return refusal

    def leave(self, gate: _Gate, work: Work, predicted: Work) -> None:
        """Give a place back, to those in line.

        It counted as `work` inside, and as `predicted` in line, as far as it was done.
        """
        gate.leave(work)
        if gate.depth:
            gate.drain.left(predicted.seconds)
        while gate.depth and self._fits(gate):
            waiter = gate.take()
            if waiter.admitted.done():  # cancelled, and not yet told so
                continue
            gate.enter(waiter.work)
            waiter.granted = True
            waiter.admitted.set_result(None)

    @property
    def _inside(self) -> int:
        return sum(gate.inside for gate in self._gates.values())

    def _gate(self, lane: Lane) -> _Gate:
        return self._gates[lane if self._max_requests is None else Lane.BULK]

    async def _wait(self, gate: _Gate, work: Work, client: str) -> None:
        if self.depth >= self.max_depth and (crowder := self._crowder(client)):
            self._push_out(crowder)
        waiter = _Waiter(work, client)
        gate.queue(waiter)
        try:
            async with asyncio.timeout(self._timeout):
                await waiter.admitted
        except BaseException as exc:
            if waiter.queued:
                gate.drop(waiter)
            elif waiter.granted:
                self.leave(gate, work, Work())
            if isinstance(exc, TimeoutError):
                message = f"no place became free within {self._timeout:g} s"
                raise self.refusal("queue_timeout", message, work) from exc
            raise

    def _crowder(self, client: str) -> str | None:
        """Who has so much of the line that one place should go to `client`."""
        places: Counter[str] = Counter()
        for gate in self._gates.values():
            places.update({name: len(line.waiters) for name, line in gate.lines.items()})
        most, count = max(places.items(), key=lambda item: item[1], default=(client, 0))
        return most if count > places[client] + 1 else None

    def _push_out(self, client: str) -> None:
        """Refuse the client's last request in line."""
        gates = [gate for gate in self._gates.values() if client in gate.lines]
        gate = max(gates, key=lambda gate: gate.lines[client].seconds)
        waiter = next(reversed(gate.lines[client].waiters))
        gate.drop(waiter)
        if not waiter.admitted.done():
            message = "the line is full, and others have waited for less"
            waiter.admitted.set_exception(self.refusal("queue_full", message, waiter.work))

    def _wait_of(self, gate: _Gate, client: str, work: Work) -> float:
        """Seconds until what is in line before it and what is over the limit have drained."""
        if not gate.depth and self._fits(gate):
            return 0.0
        ahead = gate.ahead(client, work.seconds)
        if self._max_requests is not None:
            ahead += gate.inside_seconds / max(1, gate.inside)
        elif gate.inside_batches > self._max_batches:
            ahead += gate.inside_seconds * (1 - self._max_batches / gate.inside_batches)
        return ahead / gate.drain.rate

    def _fits(self, gate: _Gate) -> bool:
        if self._max_requests is not None:
            return self._inside < self._max_requests
        return gate.inside == 0 or gate.inside_batches < self._max_batches
