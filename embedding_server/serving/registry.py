"""Which models are resident: loading them, trying again, and lending them to requests.

Loading happens off the event loop, once however many requests wait for it, while other models
serve; a load that failed is tried again with back-off.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import TypeVar

import structlog

from embedding_server.core import ModelSpec
from embedding_server.errors import ModelLoadError
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.loader import LoadError
from embedding_server.serving.model import Model

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0

log = structlog.get_logger()

T = TypeVar("T")


class State(StrEnum):
    """Where a model stands; `failed` ones are tried again."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Resident:
    """One allowed model and where it stands; while somebody is in its `with` block it is in use."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.state = State.UNLOADED
        self.model: Model | None = None
        self.error = ""
        self.loaded_at = self.retry_at = 0.0
        """On the clock of `time.monotonic`."""
        self.users = self.waiting = 0
        self.settled = asyncio.Event()
        """Set while the model is ready or its last load has failed."""
        self.loading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Resident({self.spec.id!r}, {self.state}, users={self.users})"

    def __enter__(self) -> Model:
        assert self.model
        self.users += 1
        return self.model

    def __exit__(self, *_: object) -> None:
        self.users -= 1


class Registry:
    """The allowed models of a device.

    Args:
        specs: the models.
        load: makes one resident; blocks, raises `LoadError`.
        patience: seconds a request waits for a cold model.
        max_waiting: requests that may wait for one cold model.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        load: Callable[[ModelSpec], Model],
        patience: float,
        max_waiting: int,
        metrics: Metrics,
    ) -> None:
        self.residents = {spec.id: Resident(spec) for spec in specs}
        for name in self.residents:
            metrics.model_ready.labels(name).set(0)
        self._load = load
        self._patience = patience
        self._max_waiting = max_waiting
        self._metrics = metrics

    def __repr__(self) -> str:
        return f"Registry({list(self.residents.values())!r})"

    @property
    def loaded(self) -> list[str]:
        """Ids of the models that serve, the one loaded first first."""
        ready = [one for one in self.residents.values() if one.state is State.READY]
        return [one.spec.id for one in sorted(ready, key=lambda one: one.loaded_at)]

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

    async def lease(self, spec: ModelSpec) -> Resident:
        """Load the model where it is not resident: `with await registry.lease(...)` keeps it.

        Raises:
            ModelLoadError: it is still loading after `patience` seconds, or its load failed.
        """
        resident = self.residents[spec.id]
        if resident.model is None:
            await self._wait(resident)
        return resident

    async def _wait(self, resident: Resident) -> None:
        self._ensure(resident)
        if resident.waiting >= self._max_waiting:
            message = f"{resident.waiting} requests wait for {resident.spec.id} to load"
            raise self._refusal("loading", message, self._patience)
        resident.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await resident.settled.wait()
        except TimeoutError as exc:
            raise self._refusal(
                "loading", f"{resident.spec.id} is still loading", self._patience
            ) from exc
        finally:
            resident.waiting -= 1
        if resident.model is None:
            message = f"{resident.spec.id} could not be loaded, the server tries again"
            after = resident.retry_at - time.monotonic()
            raise self._refusal("load_failed", message, after)

    def _refusal(self, reason: str, message: str, after: float) -> ModelLoadError:
        """A counted 503."""
        self._metrics.rejections.labels(reason).inc()
        return ModelLoadError(message, reason=reason, retry_after=after)

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
                resident.model = await in_daemon_thread(self._load, resident.spec)
                break
            except Exception as exc:
                known = isinstance(exc, LoadError)
                resident.error = str(exc) if known else "unexpected error, see the log"
                resident.state = State.FAILED
                resident.retry_at = time.monotonic() + delay
                resident.settled.set()
                self._metrics.load_failures.labels(name).inc()
                log.error(  # noqa: TRY400 - an expected reason needs no traceback
                    "model.failed",
                    model=name,
                    error=resident.error,
                    retry_seconds=delay,
                    exc_info=None if known else exc,
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY_SECONDS)
        resident.state, resident.error = State.READY, ""
        resident.loaded_at = time.monotonic()
        resident.settled.set()
        seconds = resident.loaded_at - started
        self._metrics.model_ready.labels(name).set(1)
        self._metrics.model_load_seconds.labels(name).set(seconds)
        model = resident.model
        self._metrics.model_bytes.labels(name).set_function(lambda: model.resident_bytes)
        log.info("model.loaded", model=name, seconds=round(seconds, 2))


async def in_daemon_thread(function: Callable[[ModelSpec], T], spec: ModelSpec) -> T:
    """`function(spec)` on a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def work() -> None:
        try:
            result = function(spec)
            outcome = partial(future.set_result, result)
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is awaited
            error = exc if isinstance(exc, Exception) else LoadError(repr(exc))
            outcome = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await future
