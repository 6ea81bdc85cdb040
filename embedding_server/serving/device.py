"""The run slots of a device, shared by all models on it.

A slot is one thread that runs one batch at a time. The device hands a free slot to the model
whose oldest text has waited longest; the model's batcher says which texts go along. Everything
but the run itself happens on the event loop, so nothing here needs a lock.
"""

import asyncio
import itertools
import os
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

from embedding_server.core import Rows
from embedding_server.serving.planner import Entry, work

if TYPE_CHECKING:
    from embedding_server.serving.batcher import Batcher

_SHARE_FLOOR = 64
"""Tokens below which a batch is not divided between idle slots: a run costs as much as 16."""
_SMOOTHING = 0.1


def usable_cores() -> int:
    """Cores this process may use, by its CPU affinity."""
    return len(os.sched_getaffinity(0))


class Run:
    """One batch on a slot, with what came of it."""

    def __init__(self, batcher: "Batcher", entries: list[Entry]) -> None:
        self.batcher = batcher
        self.entries = entries
        self.rows: Rows | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    @property
    def work(self) -> float:
        """Predicted cost, in token equivalents."""
        lengths = [entry.length for entry in self.entries]
        return work(len(lengths), max(lengths), sum(lengths))

    def execute(self) -> None:
        """Run the batch on the calling thread; an error is kept, not raised."""
        started = time.perf_counter()
        try:
            rows = self.batcher.session.run([entry.ids for entry in self.entries])
            expected = (len(self.entries), self.batcher.dimensions)
            if rows.shape != expected:
                raise ValueError(f"rows of shape {rows.shape}, expected {expected}")  # noqa: TRY301
            self.rows = rows
        except Exception as exc:  # noqa: BLE001 - whatever a session raises stays in its batch
            self.error = exc
        self.seconds = time.perf_counter() - started


class Device:
    """A device and its run slots.

    Args:
        slots: batches that may run at once.
        max_batch_tokens: tokens per batch.
    """

    def __init__(self, slots: int, max_batch_tokens: int) -> None:
        self.slots = slots
        self.max_batch_tokens = max_batch_tokens
        self.sequence = itertools.count()
        """Gives every entry its age."""
        self._free = slots
        self._waiting: dict[Batcher, None] = {}
        self._inbox: SimpleQueue[Run | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._work_per_second = 0.0

    def __repr__(self) -> str:
        return f"Device(slots={self.slots}, free={self._free}, waiting={list(self._waiting)})"

    @property
    def work_per_second(self) -> float:
        """Work that all slots together drain, learned from the runs; 0 before the first one."""
        return self._work_per_second * self.slots

    @property
    def alive(self) -> bool:
        """Whether every slot has its thread."""
        return sum(thread.is_alive() for thread in self._threads) == self.slots

    def start(self) -> None:
        """Start the slots' threads; called on the event loop that serves."""
        loop = asyncio.get_running_loop()
        for number in range(self.slots):
            thread = threading.Thread(
                target=self._serve, args=(loop,), name=f"slot-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End the threads after the runs they are in."""
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def submit(self, batcher: "Batcher") -> None:
        """Let a model with texts in line compete for the slots."""
        self._waiting[batcher] = None
        self._dispatch()

    def _dispatch(self) -> None:
        """Fill the free slots, the model with the oldest text first.

        While slots are free, what waits is divided between them, so that a lone request of many
        texts uses all of them.
        """
        self._waiting = {one: None for one in self._waiting if one.pending}
        while self._free and self._waiting:
            batcher = min(self._waiting, key=lambda one: one.pending.oldest.sequence)
            share = sum(one.pending.tokens for one in self._waiting) // self._free
            budget = min(self.max_batch_tokens, max(share, _SHARE_FLOOR))
            self._free -= 1
            self._inbox.put(Run(batcher, batcher.take(budget)))
            if not batcher.pending:
                del self._waiting[batcher]

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while run := self._inbox.get():
            run.execute()
            loop.call_soon_threadsafe(self._finish, run)

    def _finish(self, run: Run) -> None:
        self._free += 1
        if run.error is None:
            speed = run.work / run.seconds
            known = self._work_per_second or speed
            self._work_per_second = known + _SMOOTHING * (speed - known)
        # The next runs start before this one's answers are handed out.
        self._dispatch()
        run.batcher.finish(run)
