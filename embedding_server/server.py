"""Runs the application under uvicorn: the socket, the signals, the drain."""

import asyncio
import gc
import math
import signal
import socket
import ssl
import sys
from _ssl import _test_decode_cert  # type: ignore[attr-defined]
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_server import __version__
from embedding_server.app import App, create_app
from embedding_server.errors import SettingsError, StartupError
from embedding_server.observability.logging import configure, loop_failed
from embedding_server.settings import Settings

SWITCH_SECONDS = 1e-4
"""How long the event loop may keep the GIL from a run slot that has its next batch. Single texts at
32 connections: slots were busy 0.96 of the time, with Python's default of 5 ms 0.93."""

KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep idle connections (60 s in nginx): whoever closes first should be the one
that sends, or requests are lost on their way into a closing connection."""

_GC_THRESHOLD = 50_000
"""Requests leave no cycles behind: collecting after every 700 new objects, Python's default, took a
tenth of the event loop's time, most of it in what was imported once."""

log = structlog.get_logger()


class _Server(uvicorn.Server):
    """uvicorn that, when told to stop, goes on answering for a grace period first.

    Load balancers see readiness turn 503 and new work refused with `Connection: close`, not a
    closed port. A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, app: App, grace: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(loop_failed)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - its signature
        """Called by uvicorn on SIGTERM and SIGINT."""
        if self._loop is None or self._app.draining:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain, signal.Signals(sig).name)

    def _drain(self, name: str) -> None:
        log.info("server.draining", signal=name, grace_seconds=self._grace)
        self._app.drain()
        asyncio.get_running_loop().call_later(self._grace, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


class _Transport:
    """A transport that sends what one turn of the event loop writes at once.

    uvicorn writes an answer's head and its body apart: two system calls, two packets, and a client
    that is woken twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(loop_failed)
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        """Close once everything is sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        written, self._written = self._written, []
        if written and not self._transport.is_closing():
            self._transport.writelines(written)


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(_Transport(transport))  # type: ignore[arg-type]


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        StartupError: the address is not free, a certificate cannot be read, or a model is unknown.
    """
    close_log = configure(settings)
    try:
        _serve(settings)
    finally:
        close_log()


def _serve(settings: Settings) -> None:
    certificate, key = _tls(settings)
    app = create_app(settings)
    if certificate:
        app.parts.metrics.certificate.set_function(partial(_expiry, certificate))
    listener = _listen(settings.hostname, settings.port)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=_Protocol,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_ms / 1000),
    )
    log.info(
        "server.listening", address=f"{settings.hostname}:{settings.port}", version=__version__
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    server = _Server(config, app, settings.drain_grace_ms / 1000)
    server.run(sockets=[listener])
    log.info("server.stopped")


def _tls(settings: Settings) -> tuple[Path | None, Path | None]:
    """Certificate and key that can be used, or neither; raises `StartupError`."""
    if not settings.ssl_enabled:
        return None, None
    certificate, key = settings.tls_cert_path, settings.tls_key_path
    if not certificate or not key:
        raise SettingsError(
            "SERVER_SSL_ENABLED=true: set TLS_SERVER_CERT_PATH and TLS_SERVER_KEY_PATH too"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as exc:
        raise StartupError(
            f"TLS_SERVER_CERT_PATH={str(certificate)!r}, TLS_SERVER_KEY_PATH={str(key)!r}: {exc}"
        ) from exc
    return certificate, key


def _expiry(certificate: Path) -> float:
    """When the first certificate of a file expires, since 1970; NaN where it cannot be read."""
    try:
        decoded = _test_decode_cert(str(certificate))  # the only way there in Python itself
        return ssl.cert_time_to_seconds(decoded["notAfter"])
    except (OSError, ValueError):
        return math.nan


def _listen(hostname: str, port: int) -> socket.socket:
    """A listening socket; raises `StartupError`."""
    try:
        family, *_, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as exc:
        raise StartupError(f"cannot listen on {hostname}:{port}: {exc}") from exc
    return listener
