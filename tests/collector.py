"""A real OTLP collector in this process: gRPC services that keep what they get."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

Span = Any
"""OTLP's message."""


class Collector(
    trace_service_pb2_grpc.TraceServiceServicer, logs_service_pb2_grpc.LogsServiceServicer
):
    """Spans and log records, as they came; `resources` are those of their senders."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []
        self.records: list[Any] = []
        self.resources: list[dict[str, Any]] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """See OTLP."""
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for one in request.resource_spans:
                self.resources.append(values(one.resource.attributes))
                self.spans += [span for scope in one.scope_spans for span in scope.spans]
            return trace_service_pb2.ExportTraceServiceResponse()
        for one in request.resource_logs:
            self.records += [record for scope in one.scope_logs for record in scope.log_records]
        return logs_service_pb2.ExportLogsServiceResponse()

    def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> None:
        """Wait for what `condition` says."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "nothing arrived"
            time.sleep(0.01)

    def named(self, name: str) -> list[Span]:
        """The spans of this name."""
        return [span for span in self.spans if span.name == name]

    def tree(self, trace_id: bytes) -> Any:
        """A trace as nested pairs of a name and children, by start; all spans must be in it."""
        spans = [span for span in self.spans if span.trace_id == trace_id]
        ids = {span.span_id for span in spans}
        below: dict[bytes, list[Span]] = {}
        for span in sorted(spans, key=lambda span: span.start_time_unix_nano):
            parent = span.parent_span_id if span.parent_span_id in ids else b""
            below.setdefault(parent, []).append(span)

        def grown(parent: bytes) -> list[Any]:
            return [(span.name, grown(span.span_id)) for span in below.get(parent, [])]

        return grown(b"")


def values(attributes: Any) -> dict[str, Any]:
    """OTLP's attributes as a dictionary."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """A collector that listens on a port, any free one by default."""
    kept = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    kept.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield kept
    finally:
        server.stop(0).wait()
