"""Admission to the model: bounded work inside, a bounded line before it.

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
from collections import Counter
from collections.abc import Iterable

from embedding_server.errors import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.observability.stages import current_exemplar
from embedding_server.serving.cost import Work
from embedding_server.serving.forecast import Promises
from embedding_server.serving.gate import Gate, Waiter
from embedding_server.serving.schedule import Lane

_SMOOTHING = 0.05
_CAUTION = 0.8
"""Part of the longest wait that a prediction may take up: what is let in is to be served in time,
though predictions are off by a fifth."""
_LATE = 1.1
"""Predictions lean to the late side: a flood that begins slows the drain by a tenth and more."""
_JITTER = 1.25
_LEAST_WAIT = 1e-3
"""Seconds; shorter predictions are not judged by their ratio."""


class Permit:
    """A place inside, given back at the end of its `with` block."""

    def __init__(self, queue: "AdmissionQueue", gate: Gate, work: Work) -> None:
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
        self._queue.admit(self._gate)


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
        self._gates = {lane: Gate(cores) for lane in Lane}
        self._promises = Promises()
        metrics.queue_depth.set_function(lambda: self.depth)
        metrics.queue_capacity.set(max_depth)
        metrics.estimated_wait.set_function(lambda: self.estimated_wait(""))
        metrics.draining.set_function(lambda: self.draining)
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
        if refusal := self.refused([lane], client, work):
            try:
                raise refusal
            finally:
                del refusal  # see `Run.execute`
        try:
            if gate.depth or not self._fits(gate):
                permit.predicted_wait = self._wait_of(gate, client, work)
                await self._wait(gate, work, client)
            else:
                gate.enter(work)
        finally:
            permit.waited = time.monotonic() - started
            self._metrics.queue_wait.observe(permit.waited, current_exemplar())
        if permit.predicted_wait:
            ratio = permit.waited / max(permit.predicted_wait, _LEAST_WAIT)
            self._metrics.queue_wait_ratio.observe(ratio)
        gate.typical = gate.typical.towards(work, _SMOOTHING)
        return permit

    def refused(
        self, lanes: Iterable[Lane], client: str, work: Work | None = None
    ) -> ServiceUnavailable | None:
        """The 503 that a request of any of these lanes gets now, counted; None where it may stay.

        No `work` stands for a typical request.
        """
        for gate in map(self._gate, lanes):
            expected = work or gate.typical
            reason, message = self._objection(gate, client, expected)
            if not reason:
                return None
        return self.refusal(reason, message, expected)

    def _objection(self, gate: Gate, client: str, work: Work) -> tuple[str, str]:
        """Why a request is neither let in nor into the line; empty where it is."""
        if self.draining:
            return "draining", "the server is shutting down"
        if not gate.depth and self._fits(gate):
            return "", ""
        if self.depth >= self.max_depth and self._crowder(client) is None:
            return "queue_full", f"{self.max_depth} requests are waiting already"
        if (wait := self._wait_of(gate, client, work)) > _CAUTION * self._timeout:
            return "wait_too_long", f"the wait would be {wait:.1f} s, which is too long"
        return "", ""

    def refusal(self, reason: str, message: str, work: Work | None = None) -> ServiceUnavailable:
        """A counted 503 that says when to come back.

        That is when all work that is here, and all that was told to come back before, is done.
        """
        self._metrics.rejections.labels(reason).inc()
        gates = self._gates.values()
        rate = sum(gate.drain.rate for gate in gates if gate.depth) or self._cores
        seconds = (sum(gate.seconds for gate in gates) + self._promises.work) / rate
        jitter = random.uniform(1.0, _JITTER)  # noqa: S311 - spreads clients, guards nothing
        after = jitter * min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS / _JITTER)
        refusal = ServiceUnavailable(message, reason=reason, retry_after=after)
        if work:
            self._promises.add(work.seconds, refusal.retry_after)
        return refusal

    def leave(self, gate: Gate, work: Work, predicted: Work) -> None:
        """Give a place back, to those in line.

        It counted as `work` inside, and as `predicted` in line, as far as it was done.
        """
        gate.leave(work)
        if gate.depth:
            gate.drain.left(predicted.seconds)
        self.admit(gate)

    def admit(self, gate: Gate) -> None:
        """Let those in line in, as many as fit."""
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

    def _gate(self, lane: Lane) -> Gate:
        return self._gates[lane if self._max_requests is None else Lane.BULK]

    async def _wait(self, gate: Gate, work: Work, client: str) -> None:
        if self.depth >= self.max_depth and (crowder := self._crowder(client)):
            self._push_out(crowder)
        waiter = Waiter(work, client)
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
        finally:
            del waiter  # whose future may hold what is raised: see `Run.execute`

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

    def _wait_of(self, gate: Gate, client: str, work: Work) -> float:
        """Seconds until what is in line before it and what is over the limit have drained."""
        if not gate.depth and self._fits(gate):
            return 0.0
        ahead = gate.ahead(client, work.seconds)
        if self._max_requests is not None:
            ahead += gate.inside_seconds / max(1, gate.inside)
        elif gate.inside_batches > self._max_batches:
            ahead += gate.inside_seconds * (1 - self._max_batches / gate.inside_batches)
        return _LATE * ahead / gate.drain.rate

    def _fits(self, gate: Gate) -> bool:
        if self._max_requests is not None:
            return self._inside < self._max_requests
        return gate.inside == 0 or gate.inside_batches < self._max_batches
