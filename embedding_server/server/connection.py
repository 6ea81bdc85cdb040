"""One connection: HTTP/1.1 within limits of size and time, an answer for whatever is no request.

uvicorn's protocol does the work. Here is what it leaves open: heads without end, heads and bodies
that stop half-way, answers that nobody reads, too many connections, and garbage, which it answers
in the middle of another answer.
"""

import asyncio
import secrets
import time
from collections.abc import Iterable
from typing import Any

import httptools
import msgspec
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from embedding_server.api.errors import native_error
from embedding_server.api.middleware import REFUSAL
from embedding_server.api.security import security_headers
from embedding_server.errors import (
    BadRequest,
    HeadersTooLarge,
    RequestTimeout,
    ServiceError,
    Unauthorized,
    UriTooLong,
)
from embedding_server.server.tls import Certificate
from embedding_server.serving.admission import AdmissionQueue

HEAD_SECONDS = 10.0
"""Longest time from a request's first byte, or a connection's start, to the end of its headers."""
_OVER_SECONDS = 2.0
"""The same for connections over their limit, and longest time that a refused one stays."""
HEAD_BYTES, MAX_HEADERS, URL_BYTES = 1 << 16, 100, 1 << 13
_REST_SECONDS = 10.0
"""Longest time in which the rest of a request may come whose answer has been sent."""
_UNREAD_SECONDS = 30.0
"""Longest time in which a client takes nothing of an answer."""
_RESERVED = 256
"""Connections beyond the limit that get an answer; more are closed at once."""
_PROBES = ("/health", "/metrics")

log = structlog.get_logger()


class Door:
    """Who may come in.

    Args:
        connections: at once.
        queue: says when to come back.
        certificate: TLS; None: plain HTTP.
    """

    def __init__(
        self, connections: int, queue: AdmissionQueue, certificate: Certificate | None
    ) -> None:
        self.connections = connections
        self.queue = queue
        self.wants_certificates = bool(certificate and certificate.client_ca)
        data, _ = security_headers(tls=certificate is not None)
        self.headers = b"".join(b"%s: %s\r\n" % one for one in data)

    def __repr__(self) -> str:
        return f"Door(connections={self.connections}, certificates={self.wants_certificates})"


class _Transport:
    """A transport that sends what one turn of the event loop writes at once.

    uvicorn writes an answer's head and its body apart: two system calls, two packets, and a client
    that is woken twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def write_eof(self) -> None:
        """Say that nothing follows."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close once everything is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        written, self._written = self._written, []
        if written and not self._transport.is_closing():
            self._transport.writelines(written)


class _TooManyError(Exception):
    """A request has too many headers."""


class Connection(HttpToolsProtocol):
    """One of the server's connections."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, app_state: dict[str, Any], door: Door
    ) -> None:
        super().__init__(config, state, app_state, asyncio.get_running_loop())
        self._door = door
        self._over = self._stranger = False
        self._in_head = False
        self._arriving: float | None = None
        """Since when a request is on its way, or since when the first one is waited for."""
        self._chunk = self._first = self._head_bytes = 0
        """Bytes of the chunk that came last, of the one that a head began in, and since then."""
        self._refused: float | None = None
        """Since when nothing is read any more, only thrown away."""
        self._running: RequestResponseCycle | None = None
        self._unsent = (0, 0.0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(_Transport(transport))  # type: ignore[arg-type]
        excess = len(self.connections) - self._door.connections
        self._over = excess > 0
        if excess > _RESERVED:
            transport.abort()
        if self._door.wants_certificates:
            self._stranger = not transport.get_extra_info("peercert")
        self._arriving = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._refused is not None:
            return
        self._chunk = len(data)
        self._head_bytes += self._chunk
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing else is spoken here; the request itself has been read
        except httptools.HttpParserError as exc:
            many = isinstance(exc.__context__, _TooManyError)
            self._refuse(_too_many() if many else BadRequest("this is no HTTP/1.1 request"))
        else:
            if self._in_head and self._head_bytes - self._first > HEAD_BYTES:
                self._refuse(self._too_long() or _too_large())

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._in_head, self._arriving = True, time.monotonic()
        self._first = self._head_bytes = self._chunk

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if len(self.headers) == MAX_HEADERS:
            raise _TooManyError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        super().on_headers_complete()
        self._in_head = False
        refusal = self._too_long()
        path: str = self.scope["path"]
        if self._stranger and not path.startswith("/health"):
            refusal = Unauthorized("a client certificate is needed: connect with one")
        elif self._over and not path.startswith(_PROBES):
            refusal = self._door.queue.refusal("connections", "there are too many connections")
        if refusal:
            self.scope["state"][REFUSAL] = refusal
        if refusal or self._over:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        super().on_message_complete()
        self._arriving = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _too_long(self) -> ServiceError | None:
        """Whether a head is over its limits."""
        if len(self.url) > URL_BYTES:
            return UriTooLong(f"the address is over {URL_BYTES} bytes")
        if self._head_bytes <= HEAD_BYTES:
            return None
        size = sum(len(name) + len(value) for name, value in self.headers)
        return _too_large() if size > HEAD_BYTES else None

    def look(self, now: float) -> None:
        """Close what has stopped half-way; `now` is `time.monotonic`'s."""
        if self._refused is not None:
            if now - self._refused > _OVER_SECONDS:
                self.transport.close()
            return
        if self._arriving and self.flow.read_paused:
            self._arriving = now  # it is not the client that we wait for
        waited = now - (self._arriving or now)
        if self._in_head or self.cycle is None:
            if waited > (_OVER_SECONDS if self._over else HEAD_SECONDS):
                self._time_out()
        elif self.cycle.response_complete and waited > _REST_SECONDS:
            self.transport.close()
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent[0]:
            self._unsent = (unsent, now)
        elif now - self._unsent[1] > _UNREAD_SECONDS:
            self.transport.abort()

    def _time_out(self) -> None:
        if self._in_head:
            self._refuse(RequestTimeout("the headers did not arrive in time"))
        else:
            self.transport.close()  # it has said nothing at all

    def _refuse(self, error: ServiceError) -> None:
        """Answer what is no request, behind the answers to those before it, and close."""
        cycle = self.cycle
        unread = cycle if cycle and cycle.more_body and not cycle.response_complete else None
        if self.pipeline and self.pipeline[0][0] is unread:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last and last is not unread and not last.response_complete:
            last.keep_alive = False
            self.flow.pause_reading()
        elif not self.transport.is_closing():
            if unread and unread.response_started:
                self.transport.close()
                return
            # Closed at once, a client that still sends would lose the answer to a reset.
            self._refused = time.monotonic()
            self.transport.write(self._answer(error))
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def _answer(self, error: ServiceError) -> bytes:
        name = secrets.token_hex(16)
        status, body = native_error(error, name)
        content = msgspec.json.encode(body)
        log.info("connection.refused", request_id=name, code=error.code, status=status)
        return b"".join(
            (
                STATUS_LINE[status],
                b"content-type: application/json\r\nconnection: close\r\n",
                b"content-length: %d\r\nx-request-id: %s\r\n" % (len(content), name.encode()),
                self._door.headers,
                b"\r\n",
                content,
            )
        )


def _too_many() -> HeadersTooLarge:
    return HeadersTooLarge(f"there are over {MAX_HEADERS} headers")


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the headers are over {HEAD_BYTES} bytes")


def sweep(connections: Iterable[Any]) -> None:
    """Close connections that have stopped half-way; called every second or so."""
    now = time.monotonic()
    for one in list(connections):
        one.look(now)
