"""Spans of a request, made once its answer has left and sent off the event loop.

HTTP attributes follow OpenTelemetry's conventions for HTTP servers, `gen_ai.*` those for
embeddings. What a client wrote is left out: the path is the route's template, and a model's name is
that of the catalogue. A model run has a span in the trace of each of its requests, and one of its
own, in a trace of its own; they link to each other.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from embedding_server.observability.spans import Attributes, Ids, Span
from embedding_server.observability.stages import (
    CANCELLED,
    Batch,
    Call,
    Stage,
    Trace,
    parent_of,
    span_id,
)

_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
_MAX_AGENT_CHARS = 200
_LOW_BITS = (1 << 64) - 1


class _Said(NamedTuple):
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
        tell: is given spans.
        ratio: share of requests that are sampled where the client does not decide.
    """

    def __init__(self, tell: Callable[[Iterable[Span]], None], ratio: float) -> None:
        self._tell = tell
        self._bound = round(ratio * (1 << 64))
        self._offset = time.time_ns() - round(time.perf_counter() * 1e9)

    def start(self, traceparent: str, began: float) -> Trace:
        """The trace of a request that has this header, or none where it is empty or wrong."""
        if parent := parent_of(traceparent):
            if not parent.sampled:
                return Trace(began)
            trace_id, parent_id = int(parent.trace_id, 16), int(parent.span_id, 16)
            return Trace(began, trace_id=trace_id, parent_id=parent_id, tell=self._tell_run)
        trace_id = random.getrandbits(128)
        if (trace_id & _LOW_BITS) >= self._bound:
            return Trace(began)
        return Trace(began, trace_id=trace_id or 1, tell=self._tell_run)

    def finish(
        self, trace: Trace, request: Mapping[str, Any], answer: Mapping[str, Any], seconds: float
    ) -> None:
        """Tell of a request that was sampled and took so many `seconds`.

        `request` is its ASGI scope, `answer` are the fields of its log event.
        """
        self._tell(self._request(trace, request, answer, trace.began + seconds))
        trace.calls.clear()  # or they would be a cycle

    def _request(
        self, trace: Trace, request: Mapping[str, Any], answer: Mapping[str, Any], ended: float
    ) -> Iterator[Span]:
        own = Ids(trace.trace_id, trace.span_id)
        route, method = request.get("path_template"), str(request.get("method"))
        method = method if method in _METHODS else "_OTHER"
        name = method.replace("_OTHER", "HTTP")
        said = _Said(
            f"{name} {route}" if route else name,
            trace.began,
            ended,
            _http(request, answer, method),
            answer.get("code", "") if answer["status"] else CANCELLED,
            answer.get("reason", ""),
        )
        yield self._span(own, trace.parent_id, said, is_server=True, failed=answer["status"] >= 500)
        for call in trace.calls:
            yield from self._call(own, call, ended)
        if trace.encoded:
            begins = max((call.ended for call in trace.calls), default=trace.encoded)
            yield self._child(own, _Said("encode", begins, trace.encoded))

    def _call(self, parent: Ids, call: Call, ended: float) -> Iterator[Span]:
        ended = call.ended or ended
        name = f"{call.operation} {call.model}" if call.model else call.operation
        said = _Said(name, call.began, ended, _called(call), call.error, call.reason)
        yield (span := self._child(parent, said))
        for stage in _stages(call, ended):
            yield self._child(span.own, stage)
        for batch, run_id in call.runs:
            # A call that ended first has not seen how the run ends.
            early = not batch.ended or batch.ended > ended
            error = call.error if early else batch.error
            yield self._span(
                Ids(parent.trace, run_id),
                span.own.span,
                _Said("run", batch.began, ended if early else batch.ended, _run(batch), error),
                links=[Ids(batch.trace_id, batch.span_id)],
            )

    def _tell_run(self, batch: Batch) -> None:
        """Tell of a model run that has ended."""
        said = _Said(f"batch {batch.model}", batch.began, batch.ended, _run(batch), batch.error)
        links = [Ids(call.trace.trace_id, own) for call, own in batch.members if call.trace]
        self._tell([self._span(Ids(batch.trace_id, batch.span_id), 0, said, links=links)])

    def _child(self, parent: Ids, said: _Said) -> Span:
        return self._span(Ids(parent.trace, span_id()), parent.span, said)

    def _span(
        self,
        own: Ids,
        parent: int,
        said: _Said,
        *,
        links: Sequence[Ids] = (),
        is_server: bool = False,
        failed: bool = True,
    ) -> Span:
        """A span; an error makes it `failed`, unless it is the client's doing."""
        attributes, error = said.attributes, ""
        if said.error:
            why = {"inference.reason": said.reason} if said.reason else {}
            attributes = {**attributes, "error.type": said.error, **why}
            if failed and said.error not in _CLIENTS_DOING:
                error = said.reason or said.error
        began, ended = self._nanoseconds(said.began), self._nanoseconds(said.ended)
        return Span(own, parent, said.name, began, ended, attributes, links, is_server, error)

    def _nanoseconds(self, moment: float) -> int:
        return self._offset + round(moment * 1e9)


_CLIENTS_DOING = (CANCELLED, "BAD_REQUEST", "UNSUPPORTED_MODEL")
"""Of such errors a span has the type and no error status, as of a 4xx or of gRPC's CANCELLED."""


def _stages(call: Call, ended: float) -> Iterator[_Said]:
    """The spans of a call's stages, if it got so far; the last is where it failed, if it did."""
    starts = list(call.starts.items())
    ends = itertools.chain((start for _, start in starts[1:]), [ended])
    for (stage, start), end in zip(starts, ends, strict=False):
        last = stage is starts[-1][0]
        error, reason = (call.error, call.reason) if last else ("", "")
        if stage is Stage.RUN:
            # Where a run has begun, that is what failed.
            first = min((batch.began for batch, _ in call.runs), default=0.0)
            yield _Said("queue", start, first or end, error="" if first else error, reason=reason)
        elif stage is not Stage.LOAD or call.cold:
            yield _Said(_NAMES[stage], start, end, error=error, reason=reason)


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


def _called(call: Call) -> Attributes:
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
