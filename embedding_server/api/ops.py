"""Health, metrics and the API's own description."""

import time
from typing import Any

import msgspec
from litestar import Response, get

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import FORMATS, answers
from embedding_server.api.parts import Parts, parts
from embedding_server.core import Precision, Task
from embedding_server.serving.profile import Quality
from embedding_server.serving.registry import Resident


class Live(msgspec.Struct):
    """The process runs."""

    status: str


class Ready(msgspec.Struct, omit_defaults=True):
    """Whether the server serves, and if not, why."""

    status: str
    embedding: bool
    reranker: bool
    reasons: list[str] = []


class CacheInfo(msgspec.Struct):
    """Resident models, oldest first; `max_cached` and `cache_ttl` 0 = no limit."""

    cached_models: list[str]
    num_cached: int
    max_cached: int
    cache_ttl: int


class Health(msgspec.Struct):
    """One merged view."""

    status: str
    total_models: int
    loaded_models: int
    startup_complete: bool
    cache_info: CacheInfo
    uptime_seconds: float


class ModelStatus(msgspec.Struct):
    """One allowed model, as it is now; queue counts texts, quality is of a reduced precision."""

    state: str
    provider: str | None
    precision: Precision | None
    quality: Quality | None
    resident_bytes: int
    queue: int
    fingerprint: str | None
    error: str


class Status(msgspec.Struct):
    """The live numbers."""

    status: str
    embedding_ready: bool
    reranker_ready: bool
    available_permits: int
    total_queue_depth: int
    gpu_vram_pressure: float
    models: dict[str, ModelStatus]


@get("/health/live", sync_to_thread=False)
def live() -> Live:
    """200 as long as the process runs."""
    return Live(status="ok")


@get(
    "/health/ready",
    sync_to_thread=False,
    responses=answers(Ready) | answers(Ready, status=503, description="not ready"),
)
def ready(request: ApiRequest) -> Response[Ready]:
    """200 when every model that must be resident serves, else 503 with the reasons."""
    answer = parts(request).readiness.check()
    body = Ready(
        status=_word(ready=answer.ready),
        embedding=answer.tasks[Task.EMBED],
        reranker=answer.tasks[Task.RERANK],
        reasons=answer.reasons,
    )
    return Response(body, status_code=200 if answer.ready else 503)


@get("/health/status", sync_to_thread=False)
def status(request: ApiRequest) -> Status:
    """The live numbers."""
    here = parts(request)
    answer = here.readiness.check()
    return Status(
        status=_word(ready=answer.ready),
        embedding_ready=answer.tasks[Task.EMBED],
        reranker_ready=answer.tasks[Task.RERANK],
        available_permits=here.engine.queue.permits,
        total_queue_depth=here.engine.queue.depth,
        gpu_vram_pressure=round(here.device.memory.pressure, 1),
        models={name: _model(one) for name, one in here.engine.registry.residents.items()},
    )


@get("/health", sync_to_thread=False)
def health(request: ApiRequest) -> Health:
    """One merged view."""
    here = parts(request)
    answer, cache = here.readiness.check(), _cache_info(here)
    return Health(
        status=_word(ready=answer.ready),
        total_models=len(here.engine.registry.residents),
        loaded_models=cache.num_cached,
        startup_complete=answer.started,
        cache_info=cache,
        uptime_seconds=_uptime(here),
    )


class Summary(msgspec.Struct):
    """What there was to do."""

    total_requests: float
    total_embeddings: float
    cache_info: CacheInfo
    uptime_seconds: float


@get(
    "/metrics",
    sync_to_thread=False,
    opt={
        FORMATS: {
            "text/plain": str,
            "application/openmetrics-text": str,
            "application/json": Summary,
        }
    },
)
def metrics(request: ApiRequest) -> Response[bytes]:
    """Prometheus text, OpenMetrics or a JSON summary, as `Accept` asks."""
    here, accept = parts(request), request.headers.get("accept", "")
    if "application/json" in accept:
        summary = Summary(
            total_requests=here.metrics.total(here.metrics.http_requests),
            total_embeddings=here.metrics.total(here.metrics.embed_items),
            cache_info=_cache_info(here),
            uptime_seconds=_uptime(here),
        )
        return Response(msgspec.json.encode(summary), media_type="application/json")
    text, content_type = here.metrics.render(accept)
    return Response(text, media_type=content_type)


def _word(*, ready: bool) -> str:
    return "ok" if ready else "not_ready"


def _model(resident: Resident) -> ModelStatus:
    model = resident.model
    return ModelStatus(
        state=resident.state,
        provider=model.provider if model else None,
        precision=model.precision if model else None,
        quality=model.quality if model else None,
        resident_bytes=model.resident_bytes if model else 0,
        queue=model.batcher.waiting if model else 0,
        fingerprint=model.fingerprint if model else None,
        error=resident.error,
    )


def _cache_info(here: Parts) -> CacheInfo:
    registry = here.engine.registry
    return CacheInfo(
        cached_models=registry.loaded,
        num_cached=len(registry.loaded),
        max_cached=registry.max_loaded,
        cache_ttl=int(registry.ttl),
    )


def _uptime(here: Parts) -> float:
    return round(time.monotonic() - here.started, 3)


HANDLERS: list[Any] = [live, ready, status, health, metrics]
