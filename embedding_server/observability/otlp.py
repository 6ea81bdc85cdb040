"""The way to an OTLP collector: bounded queues, a thread each, and one complaint a minute.

A request only puts what is to be sent into a queue; where that is full, its oldest goes. With a
collector that is absent, slow or gone, what it was to be sent is lost, and nothing else.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import structlog
from opentelemetry.sdk.resources import Resource
from structlog.typing import EventDict, Processor

from embedding_server import __version__
from embedding_server.errors import SettingsError
from embedding_server.observability.messages import EventExporter, SpanExporter, pairs
from embedding_server.observability.outbox import Outbox
from embedding_server.observability.tracing import Tracer
from embedding_server.settings import Settings

_EXPORT_SECONDS, _CLOSE_SECONDS, _QUIET_SECONDS = 5.0, 2.0, 60.0

log = structlog.get_logger()

Close = Callable[[], None]
"""Sends what is left, for `_CLOSE_SECONDS` at most."""


def open_tracer(settings: Settings) -> tuple[Tracer, Close]:
    """What traces requests, to the collector; raises `SettingsError` for a wrong address."""
    outbox, close = _open(SpanExporter, "spans", settings)
    return Tracer(outbox.put, settings.otel_sample_ratio), close


def open_logs(settings: Settings) -> tuple[Processor, Close]:
    """What sends a copy of every event; raises `SettingsError` as above."""
    outbox, close = _open(EventExporter, "events", settings)

    def send(_logger: Any, _method: str, event: EventDict) -> EventDict:
        outbox.put([(time.time_ns(), dict(event))])
        return event

    return send, close


def _open(
    exporter_of: type[SpanExporter | EventExporter], name: str, settings: Settings
) -> tuple[Outbox, Close]:
    resource = Resource.create(
        {"service.name": settings.service_name, "service.version": __version__}
    )
    exporter = exporter_of(endpoint=_endpoint(settings), timeout=_EXPORT_SECONDS)
    exporter.resource = pairs(resource.attributes)
    _tame()
    outbox = Outbox(name, exporter.export)

    def close() -> None:
        outbox.close(_CLOSE_SECONDS)
        exporter.shutdown()

    return outbox, close


def _endpoint(settings: Settings) -> str:
    given = settings.otel_endpoint
    if not given.startswith(("http://", "https://")):
        expected = "http://host:port, or https:// with TLS"
        raise SettingsError(f"OTEL_EXPORTER_OTLP_ENDPOINT={given!r}: expected {expected}")
    return given


class _Complaints(logging.Handler):
    """The SDK's own log, one line a minute of it: it complains of every batch and every try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next = 0.0
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + _QUIET_SECONDS
        log.warning("telemetry.unsent", reason=record.getMessage(), left_out=self._left_out)
        self._left_out = 0


def _tame() -> None:
    logger = logging.getLogger("opentelemetry")
    logger.propagate = False
    if not any(isinstance(one, _Complaints) for one in logger.handlers):
        logger.handlers = [_Complaints()]
    # The exporter says what failed; gRPC's own words may hold bytes from behind a message's end.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
