"""The texts of one model on their way through its session.

`embed` puts a request's texts into the device's schedule and waits. Batches may mix the texts of
many requests and spread one request over several; vectors find back to their request here.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import structlog

from embedding_server.core import Item, Vector
from embedding_server.observability.logging import described
from embedding_server.observability.metrics import Metrics
from embedding_server.observability.stages import Call, current_exemplar
from embedding_server.runtime.errors import DeviceLostError, OutOfMemoryError
from embedding_server.runtime.session import Session
from embedding_server.serving.cost import Shape, Work
from embedding_server.serving.device import Device, Run
from embedding_server.serving.memory import Ceiling
from embedding_server.serving.profile import Profile
from embedding_server.serving.schedule import Entry, Lane

_SMOOTHING = 0.05
_NOTHING: Vector = np.empty(0, np.float32)

log = structlog.get_logger()


class RunError(Exception):
    """The model failed on a text of this request; details are in the log."""


class Job:
    """The texts of one request: vectors come in any order, the future completes with the last."""

    def __init__(self, texts: int, call: Call | None) -> None:
        self.call = call
        """Whose they are, where that is traced."""
        self.vectors: list[Vector] = [_NOTHING] * texts
        self.missing = texts
        self.failed = False
        self.exemplar = current_exemplar()
        """The request's."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Batcher:
    """One model's session on a device.

    Args:
        name: the model's id, for logs and metrics.
        session: runs the batches.
        device: whose run slots the model competes for.
        profile: what it costs, at first, and how it is run.
        exact: opens the same model in fp32, for texts whose vector is not finite.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        device: Device,
        metrics: Metrics,
        *,
        profile: Profile,
        exact: Callable[[], Session] | None = None,
    ) -> None:
        self.name = name
        self.session = session
        self._open_exact, self._exact = exact, None if exact else session
        self._opening = threading.Lock()
        self.cost = profile.cost
        """Learned: every run corrects it."""
        self.batch_tokens = profile.way.batch_tokens
        self.ceiling = Ceiling(device.memory)
        assert self.threads <= device.cores
        self._device = device
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"Batcher({self.name!r}, waiting={self.waiting})"

    @property
    def waiting(self) -> int:
        """Texts that have not started."""
        return self._device.schedule.waiting(self)

    def work(self, lengths: Iterable[int]) -> Work:
        """What texts of so many tokens cost, each among its like."""
        shape, budget = Shape.of(lengths), self._device.schedule.budget(self)
        batches = shape.tokens / budget
        cost = msgspec.structs.replace(self.cost, padded=False)
        seconds = cost.seconds(shape) + cost.run * max(0.0, batches - 1)
        return Work(seconds * self.threads, batches)

    def allowed(self, tokens: int) -> int:
        """So many tokens per batch, or as many as there is memory for."""
        return self.ceiling.allowed(tokens)

    def room(self, tokens: int) -> int:
        """So many tokens of another batch, or as many as there is memory for beside what runs."""
        return self.ceiling.room(tokens)

    @property
    def threads(self) -> int:
        """Cores that a run takes."""
        return self.session.threads.per_run

    @property
    def resident_bytes(self) -> int:
        """Size of graphs and weights, as often as they are held."""
        return sum(one.resident_bytes for one in {self.session, self._exact} if one)

    def exact(self) -> Session:
        """The session in fp32, opened when it is first needed, on the slot that needs it."""
        with self._opening:
            if self._exact is None:
                assert self._open_exact
                self._exact = self._open_exact()
            return self._exact

    async def embed(
        self, items: Sequence[Item], client: str = "", call: Call | None = None
    ) -> list[Vector]:
        """Raw vectors, in order; clients take turns. A `call` that is traced learns of its runs.

        Cancelling the caller takes what has not started out of line.

        Raises:
            RunError: the model failed on one of these texts.
            DeviceLostError: the GPU will not work again.
        """
        job = Job(len(items), call if call and call.trace else None)
        schedule = self._device.schedule
        entries = schedule.add(self, Lane.of(len(items)), client, job, items)
        self._device.dispatch()
        try:
            await job.done
        except BaseException:
            for entry in entries:
                schedule.remove(entry)
            self._device.stop_abandoned()
            raise
        if job.failed:  # not the future's exception, which would hold its own traceback
            if self._device.lost:
                raise DeviceLostError(self._device.lost)
            raise RunError("the model failed on this input")
        return job.vectors

    def finish(self, run: Run, good: list[tuple[Entry, Vector]], failed: list[Entry]) -> None:
        """Hand vectors and failures to the jobs that wait for them."""
        for entry, vector in good:
            job = entry.job
            job.vectors[entry.index] = vector
            job.missing -= 1
            if not job.missing and not job.done.done():
                job.done.set_result(None)
        for entry in failed:
            if not entry.job.done.done():
                entry.job.failed = True
                entry.job.done.set_result(None)
        # After those who were woken just now: they have waited long enough.
        asyncio.get_running_loop().call_soon(self.record, run)

    def starts(self, run: Run) -> None:
        """Count what a run takes of the device's memory; one in fp32 has an arena of its own."""
        if not run.exact:
            self.ceiling.starts(self.cost.tokens(run.shape))

    def ends(self, run: Run) -> None:
        """Count it no more, and remember what it says about how much fits."""
        if run.exact:
            return
        tokens = self.cost.tokens(run.shape)
        if isinstance(run.error, OutOfMemoryError):
            self.ceiling.ran_out(tokens)
        elif run.error:
            self.ceiling.stopped(tokens)
        else:
            self.ceiling.ran(tokens)

    def record(self, run: Run) -> None:
        """Count a run and learn from what it took."""
        if isinstance(run.error, OutOfMemoryError):
            self._metrics.out_of_memory.labels(self.name).inc()
        if run.error or (run.exact and not all(run.finite)):
            reason = described(run.error) if run.error else "the vector is not finite"
            self._metrics.run_failures.labels(self.name).inc()
            log.error("run.failed", model=self.name, texts=len(run.entries), error=reason)
        if run.error:
            return
        shape = run.shape
        self._metrics.record_run(
            self.name,
            texts=shape.texts,
            tokens=shape.tokens,
            computed=self.cost.tokens(shape),
            seconds=run.seconds,
            exemplar=run.entries[0].job.exemplar,
        )
        if run.exact:
            self._metrics.run_fallbacks.labels(self.name).inc(shape.texts)
        # Costs are those of the session on one slot, run as most batches are.
        if run.exact or run.wide or shape.tokens <= self.session.costs_above:
            return
        off = run.seconds / self.cost.seconds(shape) - 1
        self.cost = self.cost.corrected(1 + _SMOOTHING * min(1.0, off))
