"""The outermost ASGI layer: request ids, queue headers, one log event and the HTTP metrics.

It wraps the whole application, so that answers the framework makes by itself (404, 405, CORS
preflights) get an id and an event too.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, Message, Receive, Scope, Send
from litestar.utils import normalize_path

from embedding_server.api.addresses import Proxies, subscriber
from embedding_server.api.security import security_headers
from embedding_server.observability.metrics import OTHER_MODEL, Metrics
from embedding_server.observability.stages import CURRENT, Trace, parent_of
from embedding_server.serving.admission import AdmissionQueue

if TYPE_CHECKING:
    from embedding_server.observability.tracing import Tracer

CALLER = "caller"
"""Key of a connection's state: the name of its API key."""

REFUSAL = "refusal"
"""Key of a connection's state: the `ServiceError` that the server refuses the request with."""

DOCS = "/swagger-ui"

OPERATIONS = ("/health", "/metrics", DOCS, "/api/openapi.json")
"""Paths that begin so are an operator's: no log event, no HTTP metrics, no key."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

log = structlog.get_logger()


def event(scope: Scope) -> dict[str, Any]:
    """The fields of this request's log event, for handlers to add to; `request_id` is there."""
    fields: dict[str, Any] = scope["state"]["event"]
    return fields


def header(scope: Scope, name: bytes, default: str = "") -> str:
    """The first value of a request header; `name` in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return default


def client_of(scope: Scope) -> str:
    """Who sends a request, by key or else by address: clients take turns by it."""
    if caller := scope["state"].get(CALLER):
        return str(caller)
    client = scope.get("client")
    if client is None:
        return ""
    return subscriber(client[0]) if ":" in client[0] else client[0]


class RequestLog:
    """Wraps the application.

    Args:
        app: the application.
        queue: its live numbers go into the headers of inference routes.
        routes: paths of these.
        proxies: whose word counts for where a request comes from.
        tls: whether it is to be asked for by TLS only.
        tracer: is told of requests; None: nobody traces them.
    """

    def __init__(
        self,
        app: ASGIApp,
        queue: AdmissionQueue,
        routes: Collection[str],
        metrics: Metrics,
        *,
        proxies: Proxies,
        tls: bool,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._app = app
        self._queue = queue
        self._routes = routes
        self._metrics = metrics
        self._tracer = tracer
        self._proxies = proxies
        self._security, self._security_of_docs = security_headers(tls=tls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        wanted = header(scope, b"x-request-id")
        name = wanted if _REQUEST_ID.fullmatch(wanted) else secrets.token_hex(16)
        scope.setdefault("state", {})["event"] = fields = dict[str, Any](request_id=name)
        # As the router reads it: with other slashes a path would get around the guard.
        path = scope["path"] = normalize_path(scope["path"])
        if self._proxies:
            scope["client"] = (self._proxies.client(scope), 0)
        status, size, watched = 0, 0, not path.startswith(OPERATIONS)
        trace = self._traced(scope, started, self._tracer if watched else None)
        token = CURRENT.set(trace)

        async def observe(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(message, scope, name)
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            CURRENT.reset(token)
            if watched:
                seconds = time.perf_counter() - started
                fields |= {"status": status, "bytes": size}
                # After the answer has left: the server sends it at the end of this turn.
                loop = asyncio.get_running_loop()
                loop.call_soon(self._record, scope, fields, trace, seconds)

    def _traced(self, scope: Scope, started: float, tracer: "Tracer | None") -> Trace:
        """The request's trace; log event and exemplar have the id, where somebody keeps one."""
        trace, fields, traceparent = Trace(started), event(scope), header(scope, b"traceparent")
        if tracer:
            trace = tracer.start(traceparent, started)
            if trace.sampled:
                fields |= {"trace_id": f"{trace.trace_id:032x}", "span_id": f"{trace.span_id:016x}"}
        elif (parent := parent_of(traceparent)) and parent.sampled:
            fields["trace_id"] = parent.trace_id
        if "trace_id" in fields:
            trace.exemplar = {"trace_id": fields["trace_id"]}
        return trace

    def _add_headers(self, message: HTTPResponseStartEvent, scope: Scope, name: str) -> None:
        queue = self._queue
        headers = [
            (b"x-request-id", name.encode()),
            *(self._security_of_docs if scope["path"].startswith(DOCS) else self._security),
        ]
        if scope["path"] in self._routes:
            headers += [
                (b"x-queue-depth", b"%d" % queue.depth),
                (b"x-queue-capacity", b"%d" % queue.max_depth),
                (
                    b"x-estimated-wait-ms",
                    b"%d" % round(queue.estimated_wait(client_of(scope)) * 1000),
                ),
            ]
        if queue.draining:
            headers.append((b"connection", b"close"))
        message["headers"] = [*message["headers"], *headers]

    def _record(self, scope: Scope, fields: dict[str, Any], trace: Trace, seconds: float) -> None:
        endpoint = scope.get("path_template") or "unmatched"
        method, status = str(scope.get("method")), str(fields["status"] or "cancelled")
        known = method if method in _METHODS else "other"
        self._metrics.record_http(endpoint, known, status, seconds, trace.exemplar)
        if caller := scope["state"].get(CALLER):
            fields["key"] = caller
            self._metrics.record_key(caller, status, fields.get("tokens", 0))
        if trace.calls:
            fields.setdefault("model", trace.calls[0].model or OTHER_MODEL)
        log.info(
            "request",
            method=method,
            endpoint=endpoint,
            ms=round(seconds * 1000, 2),
            **fields,
        )
        if self._tracer and trace.sampled:
            self._tracer.finish(trace, scope, fields, seconds)
