"""Which models are resident: loading, lending and unloading them.

Loading happens off the event loop, once however many requests wait for it, while other models
serve; a load that failed is tried again with back-off. Where residency is limited, the model used
longest ago makes room.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from typing import TypeVar

import structlog

from embedding_server.core import ModelSpec
from embedding_server.errors import ModelLoadError, ServiceUnavailable, Unavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.loader import LoadError
from embedding_server.serving.model import Model
from embedding_server.serving.threads import Calling, in_daemon_thread, release

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0

log = structlog.get_logger()

T = TypeVar("T")


class State(StrEnum):
    """Where a model stands; `failed` ones are tried again."""

    UNLOADED = "unloaded"
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Resident:
    """One allowed model and where it stands; while somebody is in its `with` block it is in use."""

    def __init__(self, spec: ModelSpec, freed: asyncio.Event) -> None:
        self.spec = spec
        """What is known of it: the catalogue's words, and once it was located its files', too."""
        self.state = State.UNLOADED
        self.pinned = False
        """Whether it is loaded again and again until that works, and then stays."""
        self.required = False
        """Whether the settings want that."""
        self.closing = False
        """Whether new requests wait until it has made room for another model."""
        self.model: Model | None = None
        self.error = ""
        self.load_began = self.loaded_at = self.used_at = self.retry_at = 0.0
        """On the clock of `time.monotonic`."""
        self.users = self.waiting = 0
        self.settled = asyncio.Event()
        """Set while the model is ready or its last load has failed."""
        self.loading: asyncio.Task[None] | None = None
        self.load_seconds = self.retry_seconds = 0.0
        """Length of the last load, and how long the next one waits should it fail."""
        self._freed = freed

    def __repr__(self) -> str:
        return f"Resident({self.spec.id!r}, {self.state}, users={self.users})"

    def __enter__(self) -> Model:
        assert self.model
        self.users += 1
        return self.model

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        self.used_at = time.monotonic()
        self._freed.set()

    @property
    def idle(self) -> bool:
        """Whether it could be unloaded now."""
        wanted = self.pinned or self.users or (self.waiting and not self.closing)
        return self.state is State.READY and not wanted


def plan_evictions(
    residents: Iterable[Resident], *, room: int | None, ttl: float, now: float
) -> list[Resident]:
    """What to unload, the one used longest ago first.

    `room` models may stay (None = any number), and none that was not used for `ttl` seconds
    (0 = any time) before `now`. What is in use, waited for or pinned stays in any case.
    """
    present = [one for one in residents if one.state in (State.LOADING, State.READY)]
    idle = sorted((one for one in present if one.idle), key=lambda one: one.used_at)
    excess = 0 if room is None else max(0, len(present) - room)
    expired = sum(bool(ttl) and now - one.used_at >= ttl for one in idle)
    return idle[: max(excess, expired)]


class Registry:
    """The allowed models of a device.

    Args:
        specs: the models.
        load: makes one resident; blocks, raises `LoadError`.
        locate: gets its files before that, while it has no place yet; likewise.
        patience: seconds a request waits for a cold model.
        max_waiting: requests that may wait for one cold model.
        max_loaded: models that may be resident at once; 0 = all.
        ttl: seconds after which an unused one is unloaded; 0 = never.
        calling: letting go of one happens in it.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        load: Callable[[ModelSpec], Model],
        *,
        locate: Callable[[ModelSpec], ModelSpec] = lambda spec: spec,
        patience: float,
        max_waiting: int,
        max_loaded: int = 0,
        ttl: float = 0.0,
        calling: Calling,
        metrics: Metrics,
    ) -> None:
        self._freed = asyncio.Event()
        """Set whenever a place may have become free."""
        self.residents = {spec.id: Resident(spec, self._freed) for spec in specs}
        self.max_loaded, self.ttl = max_loaded, ttl
        self._load, self._locate = load, locate
        self._patience = patience
        self._max_waiting = max_waiting
        self._calling = calling
        self._metrics = metrics
        self._sweeping: asyncio.Task[None] | None = None
        for name, resident in self.residents.items():
            metrics.declare_model(name)
            metrics.show_state(name, State, lambda resident=resident: resident.state)  # type: ignore[misc]
            metrics.model_ready.labels(name).set(0)
            metrics.model_pinned.labels(name).set_function(partial(getattr, resident, "pinned"))
            metrics.queued_texts.labels(name).set_function(partial(_queued_texts, resident))
            metrics.model_bytes.labels(name).set_function(partial(_resident_bytes, resident))

    def __repr__(self) -> str:
        return f"Registry({list(self.residents.values())!r})"

    @property
    def loaded(self) -> list[str]:
        """Ids of the models that serve, the one loaded first first."""
        ready = [one for one in self.residents.values() if one.state is State.READY]
        return [one.spec.id for one in sorted(ready, key=lambda one: one.loaded_at)]

    @property
    def pinned(self) -> list[Resident]:
        """The models that are to stay."""
        return [one for one in self.residents.values() if one.pinned]

    def start(self, pinned: Iterable[ModelSpec]) -> None:
        """Start loading the models that are to stay; returns at once."""
        if self.ttl:
            self._sweeping = asyncio.create_task(self._sweep())
        for spec in pinned:
            resident = self.residents[spec.id]
            resident.pinned = resident.required = True
            self._ensure(resident)

    async def stop(self) -> None:
        """Give up loading."""
        tasks = [one.loading for one in self.residents.values() if one.loading]
        tasks += [self._sweeping] if self._sweeping else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def lease(self, spec: ModelSpec) -> Resident:
        """Load the model where it is not resident: `with await registry.lease(...)` keeps it.

        Raises:
            ModelLoadError: it is still loading after `patience` seconds, or its load failed.
        """
        resident = self.residents[spec.id]
        if resident.model is None or resident.closing:
            await self._wait(resident)
        return resident

    async def unload(self, spec: ModelSpec) -> None:
        """Unload a model as soon as nobody uses it, and keep it only on demand from then on.

        Raises:
            ServiceUnavailable: it still loads or is in use after `patience` seconds.
        """
        resident = self.residents[spec.id]
        pinned, resident.pinned = resident.pinned, False
        unloaded = False
        try:
            async with asyncio.timeout(self._patience):
                # Those who waited for the load are woken before this, and get their turn.
                while resident.users or resident.state in (State.FETCHING, State.LOADING):
                    if resident.users:
                        self._close(resident)
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError as exc:
            message = f"{spec.id} is still {'in use' if resident.users else resident.state}"
            raise self._refusal("busy", message, self._patience, ServiceUnavailable) from exc
        else:
            unloaded = True
            if resident.state is State.READY:
                self._unload(resident, "asked")
        finally:
            resident.pinned = pinned and not unloaded
            if resident.closing:
                self._reopen()

    def keep(self, spec: ModelSpec) -> None:
        """A model that was to stay from the start stays from now on, if it was unloaded since."""
        resident = self.residents[spec.id]
        resident.pinned = resident.required

    async def _wait(self, resident: Resident) -> None:
        if self.max_loaded and not resident.pinned and len(self.pinned) >= self.max_loaded:
            message = f"{resident.spec.id} has no room: INFERENCE_PRELOAD takes all of it"
            raise self._refusal("no_room", message, self._patience)
        if not resident.closing:
            self._ensure(resident)
        if resident.waiting >= self._max_waiting:
            message = f"{resident.waiting} requests wait for {resident.spec.id} to load"
            raise self._refusal("loading", message, self._remaining(resident))
        resident.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await resident.settled.wait()
        except TimeoutError as exc:
            message = f"{resident.spec.id} is still {resident.state}"
            raise self._refusal("loading", message, self._remaining(resident)) from exc
        finally:
            resident.waiting -= 1
        if resident.model is None:
            message = f"{resident.spec.id} could not be loaded, the server tries again"
            after = resident.retry_at - time.monotonic()
            raise self._refusal("load_failed", message, after)

    def _remaining(self, resident: Resident) -> float:
        """Seconds that the load will still take, by how long it took last time."""
        if not resident.load_seconds:
            return self._patience
        return resident.load_began + resident.load_seconds - time.monotonic()

    def _refusal(
        self, reason: str, message: str, after: float, kind: type[Unavailable] = ModelLoadError
    ) -> Unavailable:
        """A counted 503."""
        self._metrics.rejections.labels(reason).inc()
        return kind(message, reason=reason, retry_after=after)

    def _ensure(self, resident: Resident) -> None:
        if resident.loading is None and time.monotonic() >= resident.retry_at:
            resident.settled.clear()
            resident.loading = asyncio.create_task(self._bring_up(resident))

    async def _bring_up(self, resident: Resident) -> None:
        """Load; a pinned model until that works, others once per request that asks for them."""
        while not await self._try(resident):
            if resident.pinned:
                await asyncio.sleep(resident.retry_at - time.monotonic())
            if not resident.pinned:  # any more
                resident.loading = None
                return

    async def _try(self, resident: Resident) -> bool:
        name, resident.state = resident.spec.id, State.FETCHING
        try:
            resident.spec = await in_daemon_thread(self._locate, resident.spec)
            await self._make_room(resident)
            resident.load_began = time.monotonic()
            log.info("model.loading", model=name)
            resident.model = await in_daemon_thread(self._load, resident.spec)
        except Exception as exc:
            known = isinstance(exc, LoadError)
            resident.error = str(exc) if known else "unexpected error, see the log"
            resident.state = State.FAILED
            delay = min(max(_FIRST_RETRY_SECONDS, 2 * resident.retry_seconds), _LAST_RETRY_SECONDS)
            if isinstance(exc, LoadError) and not exc.retry:
                delay = _LAST_RETRY_SECONDS
            resident.retry_seconds, resident.retry_at = delay, time.monotonic() + delay
            self._metrics.load_failures.labels(name).inc()
            log.error(  # noqa: TRY400 - an expected reason needs no traceback
                "model.failed",
                model=name,
                error=resident.error,
                retry_seconds=delay,
                exc_info=None if known else exc,
            )
        else:
            resident.state, resident.error, resident.retry_seconds = State.READY, "", 0.0
            resident.loaded_at = resident.used_at = time.monotonic()
            resident.load_seconds = resident.loaded_at - resident.load_began
            self._metrics.model_ready.labels(name).set(1)
            self._metrics.model_info.labels(*_way(name, resident.model)).set(1)
            self._metrics.model_load_seconds.labels(name).set(resident.load_seconds)
            log.info("model.loaded", model=name, seconds=round(resident.load_seconds, 2))
        resident.settled.set()
        self._freed.set()
        return resident.model is not None

    async def _make_room(self, resident: Resident) -> None:
        """Wait until one more model may be resident, unloading idle ones, and take its place."""
        room = self.max_loaded - 1 if self.max_loaded else None
        while True:
            others = [one for one in self.residents.values() if one is not resident]
            now = time.monotonic()
            for one in plan_evictions(others, room=room, ttl=0.0, now=now):
                self._unload(one, "room")
            present = sum(one.state in (State.LOADING, State.READY) for one in others)
            if room is None or present <= room:
                resident.state = State.LOADING
                self._reopen()
                return
            busy = [one for one in others if one.state is State.READY and not one.pinned]
            if busy and not any(one.closing for one in busy):
                # Otherwise requests that overlap would keep it for ever.
                self._close(min(busy, key=lambda one: one.used_at))
            self._freed.clear()
            await self._freed.wait()

    def _close(self, resident: Resident) -> None:
        resident.closing = True
        resident.settled.clear()

    def _reopen(self) -> None:
        """Room was made; those who were to make it, and others who wait for some, look again."""
        for one in self.residents.values():
            if one.closing:
                one.closing = False
                one.settled.set()
        self._freed.set()

    async def _sweep(self) -> None:
        """Unload what nobody has used for `ttl` seconds."""
        while True:
            await asyncio.sleep(min(1.0, self.ttl / 4))
            now = time.monotonic()
            for one in plan_evictions(self.residents.values(), room=None, ttl=self.ttl, now=now):
                self._unload(one, "idle")

    def _unload(self, resident: Resident, reason: str) -> None:
        name, models = resident.spec.id, [resident.model]
        if resident.model:
            self._metrics.model_info.remove(*_way(name, resident.model))
        resident.model = resident.loading = None
        resident.state = State.UNLOADED
        resident.closing = False
        resident.settled.clear()
        self._metrics.model_ready.labels(name).set(0)
        self._metrics.evictions.labels(name, reason).inc()
        log.info("model.unloaded", model=name, reason=reason)
        if resident.waiting:
            self._ensure(resident)
        # Freeing large memory takes a while.
        arguments = models, self._calling
        threading.Thread(target=release, args=arguments, name="unload", daemon=True).start()


def _way(name: str, model: Model) -> tuple[str, str, str]:
    """Labels that say how it runs."""
    return name, model.provider, model.precision


def _queued_texts(resident: Resident) -> float:
    return resident.model.batcher.waiting if resident.model else 0


def _resident_bytes(resident: Resident) -> float:
    return resident.model.resident_bytes if resident.model else 0
