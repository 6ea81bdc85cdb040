"""Spans of a request, made once its answer has left and sent off the event loop.

HTTP attributes follow OpenTelemetry's conventions for HTTP servers, `gen_ai.*` those for
embeddings. What a client wrote is left out: the path is the route's template, and a model's name is
that of the catalogue. A model run has a span in the trace of each of its requests, and one of its
own, in a trace of its own; they link to each other.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from embedding_server import __version__
from embedding_server.observability.stages import (
    CANCELLED,
    Batch,
    Call,
    Stage,
    Trace,
    parent_of,
    span_id,
)

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("embedding_server", __version__)
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
_MAX_AGENT_CHARS = 200
_LOW_BITS = (1 << 64) - 1

Attributes = Mapping[str, str | int | float | bool]


class _Span(NamedTuple):
    """What is said of a span; `error` is empty where there is none."""

    name: str
    began: float
    ended: float
    attributes: Attributes = MappingProxyType({})
    error: str = ""
    reason: str = ""


class Tracer:
    """Decides which requests are traced, and tells of them.

    Args:
        on_end: is given every span.
        ratio: share of requests that are sampled where the client does not decide.
    """

    def __init__(
        self, on_end: Callable[[ReadableSpan], None], resource: Resource, ratio: float
    ) -> None:
        self._on_end = on_end
        self._resource = resource
        self._bound = round(ratio * (1 << 64))
        self._offset = time.time_ns() - round(time.perf_counter() * 1e9)

    def start(self, traceparent: str, began: float) -> Trace:
        """The trace of a request that has this header, or none where it is empty or wrong."""
        if parent := parent_of(traceparent):
            if not parent.sampled:
                return Trace(began)
            trace_id, parent_id = int(parent.trace_id, 16), int(parent.span_id, 16)
            return Trace(began, trace_id=trace_id, parent_id=parent_id, tell=self._tell)
        trace_id = random.getrandbits(128)
        if (trace_id & _LOW_BITS) >= self._bound:
            return Trace(began)
        return Trace(began, trace_id=trace_id or 1, tell=self._tell)

    def finish(
        self, trace: Trace, request: Mapping[str, Any], answer: Mapping[str, Any], seconds: float
    ) -> None:
        """Tell of a request that was sampled and took so many `seconds`.

        `request` is its ASGI scope, `answer` are the fields of its log event.
        """
        own = _context(trace.trace_id, trace.span_id)
        parent = None
        if trace.parent_id:
            parent = _context(trace.trace_id, trace.parent_id, is_remote=True)
        route, method = request.get("path_template"), str(request.get("method"))
        method = method if method in _METHODS else "_OTHER"
        name = method.replace("_OTHER", "HTTP")
        ended = trace.began + seconds
        error = answer.get("code", "") if answer["status"] else CANCELLED
        self._emit(
            own,
            parent,
            _Span(
                f"{name} {route}" if route else name,
                trace.began,
                ended,
                _http(request, answer, method),
                error,
                answer.get("reason", ""),
            ),
            kind=SpanKind.SERVER,
            failed=answer["status"] >= 500,
        )
        for call in trace.calls:
            self._emit_call(own, call, ended)
        if trace.encoded:
            begins = max((call.ended for call in trace.calls), default=trace.encoded)
            self._emit_child(own, _Span("encode", begins, trace.encoded))
        trace.calls.clear()  # or they would be a cycle

    def _emit_call(self, parent: SpanContext, call: Call, ended: float) -> None:
        ended = call.ended or ended
        name = f"{call.operation} {call.model}" if call.model else call.operation
        attributes = _call(call)
        said = _Span(name, call.began, ended, attributes, call.error, call.reason)
        own = self._emit_child(parent, said)
        for span in _stages(call, ended):
            self._emit_child(own, span)
        for batch, run_id in call.runs:
            # A call that ended first has not seen how the run ends.
            early = not batch.ended or batch.ended > ended
            error = call.error if early else batch.error
            self._emit(
                _context(own.trace_id, run_id),
                own,
                _Span("run", batch.began, ended if early else batch.ended, _run(batch), error),
                links=[Link(_context(batch.trace_id, batch.span_id))],
            )

    def _tell(self, batch: Batch) -> None:
        """Tell of a model run that has ended."""
        links = [
            Link(_context(call.trace.trace_id, own)) for call, own in batch.members if call.trace
        ]
        self._emit(
            _context(batch.trace_id, batch.span_id),
            None,
            _Span(f"batch {batch.model}", batch.began, batch.ended, _run(batch), batch.error),
            links=links,
        )

    def _emit_child(self, parent: SpanContext, said: _Span) -> SpanContext:
        own = _context(parent.trace_id, span_id())
        self._emit(own, parent, said)
        return own

    def _emit(
        self,
        own: SpanContext,
        parent: SpanContext | None,
        said: _Span,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
        failed: bool = True,
    ) -> None:
        """Hand over a span; an error makes it `failed`, unless it is the client's doing."""
        attributes, status = said.attributes, _UNSET
        if said.error:
            why = {"inference.reason": said.reason} if said.reason else {}
            attributes = {**attributes, "error.type": said.error, **why}
            if failed and said.error not in _CLIENTS_DOING:
                status = Status(StatusCode.ERROR, said.reason or said.error)
        self._on_end(
            ReadableSpan(
                name=said.name,
                context=own,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                links=links,
                kind=kind,
                instrumentation_scope=_SCOPE,
                status=status,
                start_time=self._nanoseconds(said.began),
                end_time=self._nanoseconds(said.ended),
            )
        )

    def _nanoseconds(self, moment: float) -> int:
        return self._offset + round(moment * 1e9)


_UNSET = Status(StatusCode.UNSET)
_CLIENTS_DOING = (CANCELLED, "BAD_REQUEST", "UNSUPPORTED_MODEL")
"""Of such errors a span has the type and no error status, as of a 4xx or of gRPC's CANCELLED."""


def _context(trace_id: int, own: int, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(trace_id, own, is_remote, _SAMPLED)


def _stages(call: Call, ended: float) -> Iterator[_Span]:
    """The spans of a call's stages, if it got so far; the last is where it failed, if it did."""
    starts = list(call.starts.items())
    ends = itertools.chain((start for _, start in starts[1:]), [ended])
    for (stage, start), end in zip(starts, ends, strict=False):
        last = stage is starts[-1][0]
        error, reason = (call.error, call.reason) if last else ("", "")
        if stage is Stage.RUN:
            # Where a run has begun, that is what failed.
            first = min((batch.began for batch, _ in call.runs), default=0.0)
            yield _Span("queue", start, first or end, error="" if first else error, reason=reason)
        elif stage is not Stage.LOAD or call.cold:
            yield _Span(_NAMES[stage], start, end, error=error, reason=reason)


_NAMES = {Stage.LOAD: "load", Stage.ADMISSION: "admission", Stage.TOKENIZE: "tokenize"}


def _http(request: Mapping[str, Any], answer: Mapping[str, Any], method: str) -> Attributes:
    route = request.get("path_template")
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "url.scheme": request.get("scheme", "http"),
        "network.protocol.version": request.get("http_version", "1.1"),
        "inference.request_id": answer["request_id"],
    }
    if route:
        attributes |= {"http.route": route, "url.path": route}
    for prefix, end in (("client", request.get("client")), ("server", request.get("server"))):
        if end:
            attributes[f"{prefix}.address"] = end[0]
            if end[1] is not None:
                attributes[f"{prefix}.port"] = end[1]
    if answer["status"]:
        attributes["http.response.status_code"] = answer["status"]
        attributes["http.response.body.size"] = answer["bytes"]
    agent = next((text for key, text in request["headers"] if key == b"user-agent"), b"")
    if agent:
        attributes["user_agent.original"] = agent[:_MAX_AGENT_CHARS].decode("latin-1")
    if "key" in answer:
        attributes["inference.key"] = answer["key"]
    return attributes


def _call(call: Call) -> Attributes:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": call.operation,
        "gen_ai.provider.name": "embedding_server",
        "inference.texts": call.texts,
    }
    if call.model:
        attributes["gen_ai.request.model"] = call.model
    if call.usage:
        attributes["gen_ai.usage.input_tokens"] = call.usage.tokens
        attributes["inference.truncated"] = call.usage.truncated
    return attributes


def _run(batch: Batch) -> Attributes:
    return {
        "gen_ai.request.model": batch.model,
        "inference.provider": batch.provider,
        "inference.precision": str(batch.precision),
        "inference.fallback": batch.exact,
        "inference.batch.requests": batch.requests,
        "inference.batch.texts": batch.texts,
        "inference.batch.tokens": batch.tokens,
        "inference.batch.padded_tokens": batch.texts * batch.longest,
    }
