"""The way to an OTLP collector: bounded queues, a thread each, and one complaint a minute.

A request only puts what is to be sent into a queue; where that is full, its oldest goes. With a
collector that is absent, slow or gone, what it was to be sent is lost, and nothing else.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from opentelemetry._logs import Logger, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from structlog.typing import EventDict

from embedding_server import __version__
from embedding_server.errors import SettingsError
from embedding_server.observability.tracing import Tracer
from embedding_server.settings import Settings

_QUEUED, _BATCH, _DELAY_MS = 4096, 512, 1000
_EXPORT_SECONDS, _CLOSE_SECONDS, _QUIET_SECONDS = 5.0, 2.0, 60.0

log = structlog.get_logger()

Close = Callable[[], None]
"""Sends what is left, for `_CLOSE_SECONDS` at most."""


def open_tracer(settings: Settings) -> tuple[Tracer, Close]:
    """What traces requests, to the collector; raises `SettingsError` for a wrong address."""
    exporter = OTLPSpanExporter(endpoint=_endpoint(settings), timeout=_EXPORT_SECONDS)
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=_QUEUED,
        max_export_batch_size=_BATCH,
        schedule_delay_millis=_DELAY_MS,
    )
    _tame()
    tracer = Tracer(processor.on_end, _resource(settings), settings.otel_sample_ratio)
    return tracer, _closing(processor, exporter)


def open_logs(settings: Settings) -> tuple["LogSink", Close]:
    """A structlog processor that sends a copy of every event; raises `SettingsError` as above."""
    exporter = OTLPLogExporter(endpoint=_endpoint(settings), timeout=_EXPORT_SECONDS)
    processor = BatchLogRecordProcessor(
        exporter,
        max_queue_size=_QUEUED,
        max_export_batch_size=_BATCH,
        schedule_delay_millis=_DELAY_MS,
    )
    _tame()
    provider = LoggerProvider(_resource(settings), shutdown_on_exit=False)
    provider.add_log_record_processor(processor)
    return LogSink(provider.get_logger("embedding_server", __version__)), _closing(
        processor, exporter
    )


class LogSink:
    """Sends events: their name as body, the rest as attributes, and the span they belong to."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> EventDict:
        """Send a copy; a processor of structlog."""
        attributes = {key: _value(value) for key, value in event.items() if key not in _ELSEWHERE}
        level = str(event.get("level", "info"))
        context = Context()
        if "trace_id" in event and "span_id" in event:
            span = SpanContext(
                int(event["trace_id"], 16),
                int(event["span_id"], 16),
                is_remote=False,
                trace_flags=_SAMPLED,
            )
            context = set_span_in_context(NonRecordingSpan(span), context)
        self._logger.emit(
            timestamp=time.time_ns(),
            context=context,
            severity_text=level,
            severity_number=_SEVERITIES.get(level, SeverityNumber.INFO),
            body=str(event.get("event", "")),
            attributes=attributes,
        )
        return event


_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_ELSEWHERE = frozenset(
    ("event", "level", "timestamp", "service", "trace_id", "span_id", "_record", "_from_structlog")
)
"""Fields that are no attributes of a record."""
_SEVERITIES = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}


def _value(value: Any) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else repr(value)


def _resource(settings: Settings) -> Resource:
    return Resource.create({"service.name": settings.service_name, "service.version": __version__})


def _endpoint(settings: Settings) -> str:
    given = settings.otel_endpoint
    if not given.startswith(("http://", "https://")):
        expected = "http://host:port, or https:// with TLS"
        raise SettingsError(f"OTEL_EXPORTER_OTLP_ENDPOINT={given!r}: expected {expected}")
    return given


class _Closed(Protocol):
    def shutdown(self) -> None: ...


def _closing(processor: _Closed, exporter: _Closed) -> Close:
    """A shutdown that takes no longer than it may: the SDK's own may take 30 seconds."""

    def close() -> None:
        late = threading.Timer(_CLOSE_SECONDS, exporter.shutdown)
        late.daemon = True
        late.start()
        processor.shutdown()
        late.cancel()

    return close


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
