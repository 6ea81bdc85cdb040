"""Spans and log events as OTLP messages, sent by the SDK's exporters."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from embedding_server import __version__
from embedding_server.observability.spans import Ids, Span

_SCOPE = {"name": "embedding_server", "version": __version__}
_LOCAL = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE = _LOCAL | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_SAMPLED = 1
_FIELDS = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}
_SEVERITIES = {
    "debug": logs_pb2.SEVERITY_NUMBER_DEBUG,
    "info": logs_pb2.SEVERITY_NUMBER_INFO,
    "warning": logs_pb2.SEVERITY_NUMBER_WARN,
    "error": logs_pb2.SEVERITY_NUMBER_ERROR,
    "critical": logs_pb2.SEVERITY_NUMBER_FATAL,
}
_ELSEWHERE = frozenset(
    ("event", "level", "timestamp", "service", "trace_id", "span_id", "_record", "_from_structlog")
)
"""Fields that are no attributes of a record."""

Event = tuple[int, Mapping[str, Any]]
"""A log event, and when it was, in nanoseconds since 1970."""


class SpanExporter(OTLPSpanExporter):
    """Sends `Span`s. `_translate_data` is what the SDK's exporters leave to their own classes."""

    resource: Sequence[Any] = ()
    """Attributes of whatever tells all this."""

    def _translate_data(self, data: Sequence[Any]) -> ExportTraceServiceRequest:
        request = ExportTraceServiceRequest()
        of_resource = request.resource_spans.add(resource={"attributes": self.resource})
        of_scope = of_resource.scope_spans.add(scope=_SCOPE)
        for span in data:
            with suppress(ValueError):  # of text that cannot be UTF-8
                of_scope.spans.add(**_span(span))
        return request


class EventExporter(OTLPLogExporter):
    """Sends `Event`s, in the same way."""

    resource: Sequence[Any] = ()

    def _translate_data(self, data: Sequence[Any]) -> ExportLogsServiceRequest:
        request = ExportLogsServiceRequest()
        of_resource = request.resource_logs.add(resource={"attributes": self.resource})
        of_scope = of_resource.scope_logs.add(scope=_SCOPE)
        for moment, event in data:
            with suppress(ValueError):
                of_scope.log_records.add(**_record(moment, event))
        return request


def _span(span: Span) -> dict[str, Any]:
    status = {"code": trace_pb2.Status.STATUS_CODE_ERROR, "message": span.error}
    kinds = trace_pb2.Span
    return {
        **_ids(span.own),
        "parent_span_id": span.parent.to_bytes(8) if span.parent else b"",
        "name": span.name,
        "kind": kinds.SPAN_KIND_SERVER if span.is_server else kinds.SPAN_KIND_INTERNAL,
        "start_time_unix_nano": span.began,
        "end_time_unix_nano": span.ended,
        "attributes": pairs(span.attributes),
        "links": [{**_ids(link), "flags": _LOCAL} for link in span.links],
        "status": status if span.error else None,
        "flags": _REMOTE if span.is_server and span.parent else _LOCAL,
    }


def _record(moment: int, event: Mapping[str, Any]) -> dict[str, Any]:
    """The event's name is the body, the rest attributes; it names the span it belongs to."""
    level = str(event.get("level", "info"))
    own: dict[str, Any] = {}
    if "trace_id" in event and "span_id" in event:
        own = {
            **_ids(Ids(int(event["trace_id"], 16), int(event["span_id"], 16))),
            "flags": _SAMPLED,
        }
    return {
        **own,
        "time_unix_nano": moment,
        "observed_time_unix_nano": moment,
        "severity_number": _SEVERITIES.get(level, logs_pb2.SEVERITY_NUMBER_INFO),
        "severity_text": level,
        "body": {"string_value": str(event.get("event", ""))},
        "attributes": pairs({key: value for key, value in event.items() if key not in _ELSEWHERE}),
    }


def _ids(ids: Ids) -> dict[str, bytes]:
    return {"trace_id": ids.trace.to_bytes(16), "span_id": ids.span.to_bytes(8)}


def pairs(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attributes as OTLP has them."""
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    for kind, field in _FIELDS.items():
        if isinstance(value, kind):
            return {field: value}
    return {"string_value": repr(value)}
