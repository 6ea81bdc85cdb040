"""Which models are resident: loading them, trying again, and lending them to requests.

Loading happens off the event loop, once however many requests wait for it, while other models
serve; a load that failed is tried again with back-off.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from enum import StrEnum

import structlog

from embedding_server.core import ModelSpec
from embedding_server.errors import ModelLoadError
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.loader import LoadError
from embedding_server.serving.model import Model

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0

log = structlog.get_logger()


class State(StrEnum):
    """Where a model stands; `failed` ones are tried again."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Resident:
    """One allowed model and where it stands."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.state = State.UNLOADED
        self.model: Model | None = None
        self.error = ""
        self.retry_at = 0.0
        self.users = 0
        self.settled = asyncio.Event()
        """Set while the model is ready or its last load has failed."""
        self.loading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Resident({self.spec.id!r}, {self.state}, users={self.users})"


class Registry:
    """The allowed models of a device.

    Args:
        specs: the models.
        load: makes one resident; blocks, raises `LoadError`.
        patience: seconds a request waits for a cold model.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        load: Callable[[ModelSpec], Model],
        patience: float,
        metrics: Metrics,
    ) -> None:
        self.residents = {spec.id: Resident(spec) for spec in specs}
        self._load = load
        self._patience = patience
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"Registry({list(self.residents.values())!r})"

    @property
    def loaded(self) -> list[str]:
        """Ids of the models that serve."""
        return [one.spec.id for one in self.residents.values() if one.state is State.READY]

    def batch_seconds(self, tokens: int) -> float:
        """Predicted time of a run of so many tokens, by the slowest loaded model."""
        models = [one.model for one in self.residents.values() if one.model]
        costs = [model.batcher.cost.seconds(1, 0, tokens) for model in models]
        return max(costs, default=1.0)

    def preload(self, specs: Iterable[ModelSpec]) -> None:
        """Start loading models; returns at once."""
        for spec in specs:
            self._ensure(self.residents[spec.id])

    async def stop(self) -> None:
        """Give up loading."""
        tasks = [one.loading for one in self.residents.values() if one.loading]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def lease(self, spec: ModelSpec) -> AsyncIterator[Model]:
        """The model, loaded first where it is not resident, and kept while it is held.

        Raises:
            ModelLoadError: it is still loading after `patience` seconds, or its load failed.
        """
        resident = self.residents[spec.id]
        model = resident.model or await self._wait(resident)
        resident.users += 1
        try:
            yield model
        finally:
            resident.users -= 1

    async def _wait(self, resident: Resident) -> Model:
        self._ensure(resident)
        try:
            async with asyncio.timeout(self._patience):
                await resident.settled.wait()
        except TimeoutError as exc:
            raise ModelLoadError(
                f"{resident.spec.id} is still loading", reason="loading", retry_after=5.0
            ) from exc
        if resident.model is None:
            raise ModelLoadError(
                f"{resident.spec.id} could not be loaded, the server tries again",
                reason="load_failed",
                retry_after=max(1.0, resident.retry_at - time.monotonic()),
            )
        return resident.model

    def _ensure(self, resident: Resident) -> None:
        if resident.loading is None:
            resident.state = State.LOADING
            resident.loading = asyncio.create_task(self._bring_up(resident))

    async def _bring_up(self, resident: Resident) -> None:
        """Load until it works, with back-off."""
        delay, name = _FIRST_RETRY_SECONDS, resident.spec.id
        while True:
            resident.state, started = State.LOADING, time.monotonic()
            log.info("model.loading", model=name)
            try:
                resident.model = await asyncio.to_thread(self._load, resident.spec)
                break
            except LoadError as exc:
                resident.state, resident.error = State.FAILED, str(exc)
                resident.retry_at = time.monotonic() + delay
                resident.settled.set()
                log.error("model.failed", model=name, error=str(exc), retry_seconds=delay)  # noqa: TRY400 - the reason is in the text
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY_SECONDS)
        resident.state, resident.error = State.READY, ""
        resident.settled.set()
        seconds = time.monotonic() - started
        self._metrics.model_ready.labels(name).set(1)
        self._metrics.model_load_seconds.labels(name).set(seconds)
        self._metrics.model_bytes.labels(name).set(resident.model.resident_bytes)
        log.info("model.loaded", model=name, seconds=round(seconds, 2))
