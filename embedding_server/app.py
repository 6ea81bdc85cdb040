"""Builds the application out of its parts; the only module that sees all of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import structlog
from litestar import Litestar
from litestar.datastructures import State
from litestar.types import ASGIApp, Receive, Scope, Send

from embedding_server.api import Face
from embedding_server.api.addresses import Proxies
from embedding_server.api.body import ApiRequest, BodyReader, ByteBudget
from embedding_server.api.cors import Cors
from embedding_server.api.description import SHOWN
from embedding_server.api.errors import renderer
from embedding_server.api.guard import Guard
from embedding_server.api.keys import Keys
from embedding_server.api.limits import RateLimit, RateLimits
from embedding_server.api.middleware import RequestLog
from embedding_server.api.parts import Parts
from embedding_server.api.tei import TIMES
from embedding_server.catalog import Catalog, Locator, open_catalog
from embedding_server.core import ModelSpec
from embedding_server.errors import SettingsError
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.machine import look
from embedding_server.runtime.memory import Monitor, MonitorError, Nvml
from embedding_server.runtime.providers import Compute
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.compute import compute_of
from embedding_server.serving.device import Device
from embedding_server.serving.engine import Engine
from embedding_server.serving.loader import Loader
from embedding_server.serving.memory import MemoryGate
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.readiness import Readiness
from embedding_server.serving.registry import Registry
from embedding_server.settings import Settings

if TYPE_CHECKING:
    from embedding_server.observability.tracing import Tracer

Lifespan = Callable[[Litestar], AbstractAsyncContextManager[None]]

_BATCHES_ADMITTED, _BATCHES_PER_CORE = 8, 2


log = structlog.get_logger()


class App:
    """The ASGI application, with the one thing a server tells it: that it is going to stop."""

    def __init__(self, asgi: ASGIApp, parts: Parts) -> None:
        self.parts = parts
        self._asgi = asgi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        await self._asgi(scope, receive, send)

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self.parts.engine.queue.draining

    @property
    def lost(self) -> str:
        """Why nothing can be computed any more; empty while it can."""
        return self.parts.device.lost

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted goes on."""
        self.parts.engine.queue.draining = True


def create_app(settings: Settings) -> App:
    """The application for `settings`; models load once its lifespan starts.

    Raises:
        StartupError: a model is unknown or cannot be read, or a provider is missing.
    """
    metrics = Metrics(settings.service_name)
    catalog = open_catalog(settings)
    compute, cores = _compute(settings, catalog), settings.threads or usable_cores()
    device = _device(settings, compute.slots(cores), metrics)
    # A CPU's cores run models; beside GPUs they have nothing better to do.
    tokenizing = ThreadPoolExecutor(1 if compute.on_cpu else cores, "tokenize")
    queue = _queue(settings, device, metrics)
    plan = RunPlan.of(settings, compute)
    loader = Loader(device, plan, Locator(settings), tokenizing, metrics)
    registry = _registry(settings, catalog, loader, compute, metrics)
    engine = Engine(
        catalog,
        registry,
        queue,
        metrics,
        max_text_chars=settings.max_text_chars,
        defaults=[
            catalog.spec(name, "INFERENCE_DEFAULT_MODEL").id for name in settings.default_model
        ],
    )
    preloaded = _preloaded(settings, catalog)
    tracer, close_tracer = _tracer(settings)
    parts = Parts(
        settings=settings,
        metrics=metrics,
        device=device,
        engine=engine,
        readiness=Readiness(
            catalog=catalog,
            registry=registry,
            device=device,
            queue=queue,
            policy=settings.ready_policy,
        ),
        started=time.monotonic(),
        created=int(time.time()),
    )
    metrics.ready.set_function(lambda: parts.readiness.check().ready)
    keys = Keys(settings.api_keys)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        metrics.show_tasks(asyncio.get_running_loop())
        device.start()
        registry.start(preloaded)
        following = asyncio.create_task(keys.follow())
        yield
        following.cancel()
        await registry.stop()
        tokenizing.shutdown(wait=False, cancel_futures=True)
        device.stop()
        await asyncio.to_thread(close_tracer)

    face = Face.of(settings.dialects)
    app = _guarded(_litestar(parts, face, lifespan), parts, face, keys)
    logged = RequestLog(
        app,
        queue,
        face.inference_routes,
        metrics,
        proxies=Proxies(settings.trusted_proxies),
        tls=settings.ssl_enabled,
        tracer=tracer,
    )
    return App(logged, parts)


def _guarded(app: ASGIApp, parts: Parts, face: Face, keys: Keys) -> ASGIApp:
    """What stands before the application itself: who may come in, and from which pages."""
    settings = parts.settings
    tokens = RateLimit(settings.rate_limit_tokens, what="tokens")
    guard = Guard(
        app,
        parts.engine.queue,
        face.inference_routes,
        face.shapes,
        keys=keys,
        limits=RateLimits(RateLimit(settings.rate_limit), tokens),
    )
    return Cors(guard, settings.cors_allowed_origins, [*SHOWN, *TIMES])


def _tracer(settings: Settings) -> tuple["Tracer | None", Callable[[], None]]:
    """What traces requests, if anything does, and what sends the rest at the end."""
    if not settings.otel_enabled:
        return None, lambda: None
    # It takes 0.2 s and 20 MB to import.
    from embedding_server.observability.otlp import open_tracer  # noqa: PLC0415

    return open_tracer(settings)


def _device(settings: Settings, slots: int, metrics: Metrics) -> Device:
    memory = MemoryGate(_monitor(settings), settings.gpu_pressure_threshold, metrics)
    return Device(slots, settings.max_batch_tokens, memory, metrics)


def _registry(
    settings: Settings, catalog: Catalog, loader: Loader, compute: Compute, metrics: Metrics
) -> Registry:
    return Registry(
        catalog.models.values(),
        loader,
        locate=loader.locate,
        patience=settings.queue_timeout_ms / 1000,
        max_waiting=settings.max_queue_depth,
        max_loaded=settings.max_loaded_models,
        ttl=settings.model_ttl_seconds,
        calling=compute.calls.shared,
        metrics=metrics,
    )


def _queue(settings: Settings, device: Device, metrics: Metrics) -> AdmissionQueue:
    return AdmissionQueue(
        max_requests=settings.max_concurrent_requests,
        max_batches=max(_BATCHES_ADMITTED, _BATCHES_PER_CORE * device.cores),
        max_depth=settings.max_queue_depth,
        timeout=settings.queue_timeout_ms / 1000,
        cores=device.cores,
        metrics=metrics,
    )


def _compute(settings: Settings, catalog: Catalog) -> Compute:
    """What models run on; raises `ProviderError`."""
    machine = look(settings.cuda_visible_devices)
    compute = compute_of(settings, machine, catalog.models.values())
    idle = machine.cards and compute.on_cpu and settings.providers == ("auto",)
    say = log.warning if idle else log.info
    say("compute.chosen", providers=compute.choice.names, reason=compute.choice.reason)
    return compute


def _monitor(settings: Settings) -> Monitor | None:
    try:
        return Nvml(settings.cuda_visible_devices)
    except MonitorError:
        return None


def _litestar(parts: Parts, face: Face, lifespan: Lifespan) -> Litestar:
    settings, queue = parts.settings, parts.engine.queue
    budget = ByteBudget(settings.max_queued_bytes, queue, parts.metrics)
    return Litestar(
        face.handlers,
        request_class=ApiRequest,
        middleware=[
            lambda app: BodyReader(
                app,
                settings.max_body_bytes,
                budget,
                queue,
                parts.metrics,
                timeout=settings.request_timeout_ms / 1000 or None,
            )
        ],
        exception_handlers={Exception: renderer(face.shapes)},
        lifespan=[lifespan],
        openapi_config=None,
        state=State({"parts": parts, "shapes": face.shapes}),
        request_max_body_size=None,
        logging_config=None,
    )


def _preloaded(settings: Settings, catalog: Catalog) -> tuple[ModelSpec, ...]:
    """What to load at start: as `INFERENCE_PRELOAD` says, else all unless something limits it."""
    limit = settings.max_loaded_models
    if settings.preload is not None:
        names = settings.preload
        specs = {(spec := catalog.spec(name, "INFERENCE_PRELOAD")).id: spec for name in names}
        if limit and len(specs) > limit:
            raise SettingsError(
                f"INFERENCE_PRELOAD names {len(specs)} models, but"
                f" INFERENCE_MAX_LOADED_MODELS={limit}: raise it, or name fewer"
            )
        return tuple(specs.values())
    everything = "*" in settings.allowed_embedding_models + settings.allowed_rerank_models
    if everything or limit or settings.model_ttl_seconds:
        return ()
    return tuple(catalog.models.values())
