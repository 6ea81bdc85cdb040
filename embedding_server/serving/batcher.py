"""The texts of one model on their way through its session.

`embed` puts a request's texts in line and waits; the device takes batches from the line, which may
mix the texts of many requests and spread one request over several batches, and brings their rows
back.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
import structlog

from embedding_server.core import Ids, Rows
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.session import Session
from embedding_server.serving.device import Device, Run
from embedding_server.serving.planner import Entry, Pending

log = structlog.get_logger()


class RunError(Exception):
    """The model failed on a batch with this request's texts; details are in the log."""


class Job:
    """The texts of one request: rows arrive in any order, the future completes with the last."""

    def __init__(self, texts: int, dimensions: int) -> None:
        self.rows: Rows = np.empty((texts, dimensions), np.float32)
        self.missing = texts
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Batcher:
    """The waiting line of one model.

    Args:
        name: the model's id, for logs and metrics.
        session: runs the batches.
        device: whose run slots the model competes for.
        dimensions: width of a row.
    """

    def __init__(
        self, name: str, session: Session, device: Device, dimensions: int, metrics: Metrics
    ) -> None:
        self.name = name
        self.session = session
        self.pending = Pending()
        self._device = device
        self.dimensions = dimensions
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"Batcher({self.name!r}, {self.pending!r})"

    async def embed(self, texts: Sequence[Ids]) -> Rows:
        """Raw rows of shape (texts, dimensions), in order.

        Cancelling the caller takes what has not started out of line.

        Raises:
            RunError: a run with one of these texts failed.
        """
        job = Job(len(texts), self.dimensions)
        entries = [
            Entry(
                ids=ids, job=job, index=index, sequence=next(self._device.sequence), length=len(ids)
            )
            for index, ids in enumerate(texts)
        ]
        for entry in entries:
            self.pending.add(entry)
        self._device.submit(self)
        try:
            await job.done
        except BaseException:
            self.pending.remove(entries)
            raise
        return job.rows

    def take(self, budget: int) -> list[Entry]:
        """Plan the next batch and take it out of line."""
        batch = self.pending.plan(budget)
        self.pending.remove(batch)
        return batch

    def finish(self, run: Run) -> None:
        """Hand a run's rows, or its failure, to the jobs that wait for them."""
        if run.rows is None:
            self._metrics.run_failures.labels(self.name).inc()
            log.error("run.failed", model=self.name, texts=len(run.entries), error=repr(run.error))
            for job in {id(entry.job): entry.job for entry in run.entries}.values():
                if not job.done.done():
                    job.done.set_exception(RunError("the model failed on this input"))
            return
        self._metrics.record_run(self.name, [entry.length for entry in run.entries], run.seconds)
        for entry, row in zip(run.entries, run.rows, strict=True):
            job = entry.job
            job.rows[entry.index] = row
            job.missing -= 1
            if not job.missing and not job.done.done():
                job.done.set_result(None)
