"""The cores of a device, shared by all models on it.

A run takes as many cores as its model's session has threads, and a thread of ours, a run slot, to
wait for it; the schedule says which batch is next. Everything but the run itself happens on the
event loop, so nothing here needs a lock. A failed batch is split until the text that caused it is
alone; a run that hangs, or whose clients have all left, is stopped.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import structlog

from embedding_server.core import Precision, Vector, Vectors, values
from embedding_server.observability.metrics import Metrics
from embedding_server.observability.stages import Batch
from embedding_server.runtime.errors import DeviceLostError, OutOfMemoryError
from embedding_server.runtime.session import Stop
from embedding_server.serving.cost import Shape
from embedding_server.serving.memory import MemoryGate
from embedding_server.serving.schedule import Entry, Schedule

if TYPE_CHECKING:
    from embedding_server.serving.batcher import Batcher

_WATCHDOG_SECONDS, _WATCHDOG_FACTOR, _WATCH_SECONDS = 60.0, 10.0, 1.0
"""A run that takes longer, and so many times longer than predicted, is taken for hung; and how
often that is looked at."""

_STOP_SECONDS = 2.0

log = structlog.get_logger()

T = TypeVar("T")


class Run:
    """One batch on a slot, with what came of it."""

    def __init__(
        self,
        batcher: "Batcher",
        entries: list[Entry],
        *,
        wide: bool = False,
        exact: bool = False,
        lean: bool = False,
    ) -> None:
        self.batcher = batcher
        self.wide = wide
        self.exact = exact
        """Whether it is a second try in fp32, after a row that was not finite."""
        self.entries = entries
        self.stop = Stop(lean=lean)
        """`lean` after memory ran out: such a run has the device for itself."""
        self.vectors: Vectors | None = None
        self.finite: list[bool] = []
        """Whether each vector is."""
        self.error: BaseException | None = None
        self.started = 0.0
        self.began = self.seconds = 0.0
        """When the session was called, by `time.perf_counter`, and how long it took."""
        self.traced: Batch | None = None
        """What the traces of its requests show of it, if any does."""

    @property
    def hung(self) -> float:
        """Seconds it has been running, if that is too long; else 0."""
        seconds = time.monotonic() - self.started
        predicted = self.batcher.cost.seconds(self.shape)
        too_long = max(_WATCHDOG_SECONDS, _WATCHDOG_FACTOR * predicted)
        return seconds if seconds > too_long else 0.0

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(entry.job.done.done() for entry in self.entries)

    @cached_property
    def shape(self) -> Shape:
        """What it costs by."""
        return Shape.of(entry.length for entry in self.entries)

    def execute(self) -> None:
        """Run the batch on the calling thread.

        An error of the session is kept; what is no `Exception` is kept and raised. Tracebacks are
        not, its own or of what caused it: this frame is in them, so run and error would hold each
        other, and with them the model, until Python looks for cycles, which it hardly does here.
        """
        self.began = time.perf_counter()
        try:
            items = [entry.item for entry in self.entries]
            session = self.batcher.exact() if self.exact else self.batcher.session
            vectors = session.run(items, wide=self.wide, stop=self.stop)
            if len(vectors) != len(items):
                raise ValueError(f"{len(vectors)} vectors of {len(items)} inputs")  # noqa: TRY301
            self.vectors, self.finite = vectors, _finite(vectors)
        except BaseException as exc:
            self.error = exc.with_traceback(None)
            exc.__cause__ = exc.__context__ = None
            if not isinstance(exc, Exception):
                raise
        finally:
            self.seconds = time.perf_counter() - self.began

    def trace(self) -> None:
        """Let the requests that are traced know that it starts."""
        jobs = dict.fromkeys(entry.job for entry in self.entries)
        if calls := [job.call for job in jobs if job.call]:
            texts, longest, tokens, _ = self.shape
            session = self.batcher.session
            self.traced = Batch(
                calls,
                model=self.batcher.name,
                provider=session.provider,
                precision=Precision.FP32 if self.exact else session.precision,
                exact=self.exact,
                requests=len(jobs),
                texts=texts,
                longest=longest,
                tokens=tokens,
            )

    def sort(self) -> "tuple[list[tuple[Entry, Vector]], list[Run], list[Entry]]":
        """What came of each entry: vectors to deliver, runs to try next, entries that failed.

        A failed batch of several requests is tried again in halves, unless it hung, and one for
        which memory did not suffice whoever sent it; a text whose vector is not finite is tried
        again alone, in fp32.
        """
        if isinstance(self.error, OutOfMemoryError):
            if len(self.entries) > 1 or not self.stop.lean:
                parts = filter(None, _halves(self.entries))
                return (
                    [],
                    [Run(self.batcher, part, exact=self.exact, lean=True) for part in parts],
                    [],
                )
            return [], [], self.entries
        if self.vectors is None:
            if self.stop.called or all(entry.job is self.entries[0].job for entry in self.entries):
                return [], [], self.entries
            return [], [Run(self.batcher, half) for half in _halves(self.entries)], []
        good, bad = [], []
        for entry, vector, finite in zip(self.entries, self.vectors, self.finite, strict=True):
            if finite:
                good.append((entry, vector))
            else:
                bad.append(entry)
        if self.exact:
            return good, [], bad
        return good, [Run(self.batcher, [entry], exact=True) for entry in bad], []


def _finite(vectors: Vectors) -> list[bool]:
    """One value that is not finite makes the sum of its vector so."""
    if isinstance(vectors, np.ndarray):
        found: list[bool] = np.isfinite(vectors.sum(axis=1)).tolist()
        return found
    return [bool(np.isfinite(values(one).sum())) for one in vectors]


def _halves(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    middle = len(entries) // 2
    return entries[:middle], entries[middle:]


class Device:
    """A device and its run slots.

    Args:
        cores: threads that may run at once; of GPUs, batches.
        max_batch_tokens: tokens per batch; None = as suits the model.
        memory: what batches may take of it.
    """

    def __init__(
        self, cores: int, max_batch_tokens: int | None, memory: MemoryGate, metrics: Metrics
    ) -> None:
        self.cores = cores
        self.memory = memory
        self.runs = 0
        """Runs started so far."""
        self.lost = ""
        """Why a GPU will not work again for this process; empty while it does."""
        self.schedule: Schedule[Batcher] = Schedule(max_batch_tokens)
        self._metrics = metrics
        self._retries: deque[Run] = deque()
        self._running: dict[Run, int] = {}
        """Each with the cores it takes."""
        self._inbox: SimpleQueue[Run | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._watching: asyncio.Task[None] | None = None
        metrics.slots.set(cores)
        metrics.running.set_function(lambda: len(self._running))

    def __repr__(self) -> str:
        return f"Device(cores={self.cores}, running={len(self._running)}, {self.schedule!r})"

    @property
    def problem(self) -> str:
        """Why the device does not serve; empty while it does."""
        if not self._threads:
            return "the run slots are stopped"
        if self.lost:
            return "a GPU is lost, the server ends"
        hung = max((run.hung for run in self._running), default=0.0)
        return f"a model run hangs since {hung:.0f} s" if hung else ""

    @property
    def idle(self) -> bool:
        """Whether nothing runs, and so nothing waits; may be asked from any thread, as `runs`."""
        return not self._running

    def start(self) -> None:
        """Start the slots' threads; called on the event loop that serves."""
        loop = asyncio.get_running_loop()
        self._threads = [self._start_thread(loop) for _ in range(self.cores)]
        self._watching = loop.create_task(self._watch())
        self.memory.start()

    def stop(self) -> None:
        """Stop the runs and end the threads, or leave them behind where a run hangs."""
        self.memory.stop()
        if self._watching:
            self._watching.cancel()
        for run in self._running:
            run.stop()
        for _ in self._threads:
            self._inbox.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def dispatch(self) -> None:
        """Give free cores batches, failed ones first."""
        while (free := self.cores - sum(self._running.values())) > 0:
            if any(run.stop.lean for run in self._running):
                return
            if self._retries:
                if self._retries[0].batcher.threads > free:
                    return
                if self._retries[0].stop.lean and self._running:
                    return
                run = self._retries.popleft()
                run.entries = [entry for entry in run.entries if not entry.job.done.done()]
                if not run.entries:
                    continue
            elif taken := self.schedule.take(free):
                batcher, entries = taken
                lone = free == self.cores and not self.schedule
                run = Run(batcher, entries, wide=lone and batcher.session.has_wide)
            else:
                return
            run.started = time.monotonic()
            run.batcher.starts(run)
            run.trace()
            self.runs += 1
            self._running[run] = run.batcher.threads  # a wide one shares with whoever comes
            self._inbox.put(run)

    def stop_abandoned(self) -> None:
        """Stop the runs that nobody waits for any more."""
        for run in self._running:
            if run.abandoned:
                run.stop()

    async def _watch(self) -> None:
        """Stop the runs that hang; readiness says so until they have ended."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self._stop_hung()  # a call: here, the last run seen would outlive its model

    def _stop_hung(self) -> None:
        for run in self._running:
            if run.hung and not run.stop.called:
                log.error("run.hung", model=run.batcher.name, texts=len(run.entries))
                run.stop()

    def _start_thread(self, loop: asyncio.AbstractEventLoop) -> threading.Thread:
        thread = threading.Thread(target=self._serve, args=(loop,), name="slot", daemon=True)
        thread.start()
        return thread

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while run := self._inbox.get():
            try:
                run.execute()
            except BaseException:  # noqa: BLE001 - the run keeps it; this thread is not trusted again
                self._tell(loop, self._replace, threading.current_thread())
                return
            finally:
                self._tell(loop, self._finish, run)
                del run  # or the model of the last run would live as long as nothing runs

    def _tell(self, loop: asyncio.AbstractEventLoop, what: Callable[[T], None], about: T) -> None:
        with suppress(RuntimeError):  # a run that hung may outlive the loop
            loop.call_soon_threadsafe(what, about)

    def _finish(self, run: Run) -> None:
        del self._running[run]
        run.batcher.ends(run)
        if isinstance(run.error, DeviceLostError):
            self.lost = str(run.error)
        if run.traced:
            error = type(run.error).__name__ if run.error else ""
            run.traced.end(run.began, run.seconds, error)
        if run.abandoned:
            self.dispatch()
            if not run.error:
                run.batcher.record(run)
            return
        good, again, failed = run.sort()
        self._retries.extendleft(reversed(again))
        if again:
            self._metrics.run_retries.labels(run.batcher.name).inc(len(again))
        if failed:  # before any retry of the same request starts
            run.batcher.finish(run, good, failed)
            self.dispatch()
        else:  # the next runs start before this one's answers are handed out
            self.dispatch()
            run.batcher.finish(run, good, failed)

    def _replace(self, thread: threading.Thread) -> None:
        if not self._threads:  # stopped meanwhile
            return
        log.error("slot.restarted")
        self._metrics.slot_restarts.inc()
        self._threads.remove(thread)
        self._threads.append(self._start_thread(asyncio.get_running_loop()))
