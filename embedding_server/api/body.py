"""The way in: the bytes of a request's body, and the struct they decode to.

`BodyReader` is a pure ASGI middleware that reads the whole body under its limits before a handler
is called; `ApiRequest` lets Litestar decode JSON straight into the handler's `data` type, with a
400 for whatever is wrong with it.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from litestar import Request
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPReceiveMessage, Message, Receive, Scope, Send

from embedding_server.api.decoding import decoded
from embedding_server.api.encodings import decompress, too_large, unpacked_size
from embedding_server.api.middleware import header
from embedding_server.errors import RequestTimeout, UnsupportedMediaType
from embedding_server.observability.metrics import Metrics
from embedding_server.serving.admission import AdmissionQueue

_CHARGED_UNREAD = 1 << 20
"""Bytes of a body that are charged before any has arrived; more of them once they do."""
_UNPACKED_INLINE = 1 << 18
"""Bytes that are unpacked in less time than it takes to go to another thread."""
PART_SECONDS = 10.0
"""Longest pause between parts of a body."""


class ApiRequest(Request[Any, Any, State]):
    """A request whose JSON body becomes the struct that the handler's `data` names."""

    async def body(self) -> bytes:
        """The body's bytes, which are not kept: Litestar only asks whether there are any."""
        message = await self.receive()
        assert message["type"] == "http.request"
        return message["body"]

    async def json(self) -> Any:
        """The decoded body, whose bytes are not kept; raises as `decoded` does."""
        field, message = self.route_handler.parsed_data_field, await self.receive()
        assert field is not None
        assert message["type"] == "http.request"
        body, message["body"] = message["body"], b""
        return decoded(body, field.annotation)


class ByteBudget:
    """Bytes of request bodies that are inside at once, at most `limit`."""

    def __init__(self, limit: int, queue: AdmissionQueue, metrics: Metrics) -> None:
        self._limit = limit
        self._queue = queue
        self._used = 0
        metrics.queued_bytes.set_function(lambda: self._used)

    def __repr__(self) -> str:
        return f"ByteBudget(used={self._used}, limit={self._limit})"

    @contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """A function that charges so many bytes more, or raises `ServiceUnavailable`.

        All that it charged is given back at the end.
        """
        charged = 0

        def charge(size: int) -> None:
            nonlocal charged
            if charged + size > self._limit:
                raise too_large(self._limit)
            if self._used + size > self._limit:
                raise self._queue.refusal("queued_bytes", "too many request bytes are waiting")
            charged += size
            self._used += size

        try:
            yield charge
        finally:
            self._used -= charged


class BodyReader:
    """Reads, bounds and decompresses the body of a POST, then calls the handler with all of it.

    A client that hangs up after that cancels its handler, so that its texts leave the line.

    Args:
        app: the next ASGI application.
        max_bytes: limit of a body, before and after decompression.
        budget: bounds the bodies of all requests together.
        timeout: seconds a request may take in all; None = no limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        budget: ByteBudget,
        queue: AdmissionQueue,
        metrics: Metrics,
        *,
        timeout: float | None,
    ) -> None:
        self._app = app
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._budget = budget
        self._queue = queue
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != ScopeType.HTTP or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _require_json(header(scope, b"content-type"))
        arrived = False
        try:
            async with asyncio.timeout(self._timeout) as limit:
                with self._budget.account() as charge:
                    declared = int(header(scope, b"content-length", "0"))
                    body = await self._read(receive, charge, declared)
                    if body is None:
                        self._metrics.cancelled.inc()
                        return
                    arrived = True
                    encoding = header(scope, b"content-encoding", "identity").strip().lower()
                    if encoding != "identity":
                        body = await self._unpack(body, encoding, charge)
                    message: HTTPReceiveMessage = {
                        "type": "http.request",
                        "body": body,
                        "more_body": False,
                    }
                    del body  # whoever reads the message takes it out
                    await self._handle(message, limit, scope, receive, send)
        except TimeoutError as exc:
            if not arrived:
                raise RequestTimeout("the body did not arrive in time") from exc
            raise self._queue.refusal(
                "request_timeout", "the request took too long: it was not done in time"
            ) from exc

    async def _read(
        self, receive: Receive, charge: Callable[[int], None], declared: int
    ) -> bytes | None:
        """The body as sent; None if the client left before its end."""
        self._require_fit(declared)
        charged = min(declared, _CHARGED_UNREAD)
        charge(charged)
        body, more = bytearray(), True
        while more:
            async with asyncio.timeout(PART_SECONDS):
                message = await receive()
            if message["type"] != "http.request":
                return None
            part = message["body"]
            body += part
            self._require_fit(len(body))
            if len(body) > charged:  # large, or chunked
                charge(len(body) - charged)
                charged = len(body)
            more = message["more_body"]
        return bytes(body)

    async def _unpack(self, body: bytes, encoding: str, charge: Callable[[int], None]) -> bytes:
        said = unpacked_size(body, encoding) or 0
        charge(min(said, self._max_bytes))
        if max(said, len(body)) < _UNPACKED_INLINE:
            plain = decompress(body, encoding, self._max_bytes)
        else:
            plain = await asyncio.to_thread(decompress, body, encoding, self._max_bytes)
        charge(max(0, len(plain) - said))
        return plain  # type: ignore[return-value]  # msgspec reads it as well, and copies cost

    async def _handle(
        self,
        message: HTTPReceiveMessage,
        limit: asyncio.Timeout,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        left = False

        async def watch() -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            left = True
            handler.cancel()

        async def replay() -> HTTPReceiveMessage:
            return message

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                watcher.cancel()  # from here on the server reports every end as a disconnect
            await send(message)

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, replay, forward)
        except asyncio.CancelledError:
            if left:
                handler.uncancel()
                self._metrics.cancelled.inc()
            elif self._queue.draining and not limit.expired():
                # The server's time to finish accepted work is over.
                handler.uncancel()
                raise self._queue.refusal("draining", "the server is shutting down") from None
            else:
                raise
        finally:
            watcher.cancel()

    def _require_fit(self, size: int) -> None:
        if size > self._max_bytes:
            raise too_large(self._max_bytes)


def _require_json(content_type: str) -> None:
    if content_type.partition(";")[0].strip().lower() not in ("application/json", ""):
        raise UnsupportedMediaType(f"send application/json, not {content_type[:100]}")
