"""Runs the application under uvicorn: the socket, the signals, the drain."""

import asyncio
import gc
import math
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Any

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from embedding_server import __version__
from embedding_server.app import App, create_app
from embedding_server.errors import StartupError
from embedding_server.observability.logging import configure, loop_failed
from embedding_server.server.connection import HEAD_SECONDS, Connection, Door, sweep
from embedding_server.server.tls import Certificate, open_certificate
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

_BACKLOG = 2048
_TICKS_PER_SWEEP = 10
_GOODBYE_SECONDS = 1.0
_DEVICE_LOST = 1
"""Exit status that has an orchestrator start another process: only that gets a GPU back."""
_OTHER_FILES = 512
"""Files that are open beside connections: models, libraries, and connections over the limit."""

log = structlog.get_logger()


class _Server(uvicorn.Server):
    """uvicorn that, when told to stop, goes on answering for a grace period first.

    Load balancers see readiness turn 503 and new work refused with `Connection: close`, not a
    closed port. A second signal ends the process at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: App,
        certificate: Certificate | None,
        *,
        connections: int,
        grace: float,
    ) -> None:
        super().__init__(config)
        self._app = app
        self._certificate = certificate
        self._door = Door(connections, app.parts.engine.queue, certificate)
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._following: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        self._loop = loop = asyncio.get_running_loop()
        loop.set_exception_handler(loop_failed)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        tls: dict[str, Any] = {}
        if self._certificate:
            tls = {
                "ssl": self._certificate.context,
                "ssl_handshake_timeout": HEAD_SECONDS,
                # A client that is idle does not say goodbye; nobody waits for that.
                "ssl_shutdown_timeout": _GOODBYE_SECONDS,
            }
            self._following = asyncio.create_task(self._certificate.follow())
        self.servers = [
            await loop.create_server(self._connection, sock=one, backlog=_BACKLOG, **tls)
            for one in sockets or []
        ]
        self.started = True

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._door)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; whether to stop."""
        if counter % _TICKS_PER_SWEEP == 0:
            sweep(self.server_state.connections)
        if self._app.lost and not self._app.draining:
            log.error("device.lost", error=self._app.lost)
            self._app.drain()
            self._stop()
        return await super().on_tick(counter)

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


def run(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        StartupError: the address is not free, a certificate cannot be read, or a model is unknown.
    """
    close_log = configure(settings)
    try:
        lost = _serve(settings)
    finally:
        close_log()
    if lost:
        sys.stdout.flush()
        os._exit(_DEVICE_LOST)  # what is left of CUDA aborts where it is taken apart


def _serve(settings: Settings) -> bool:
    """Serve; whether a GPU was lost."""
    certificate = open_certificate(settings)
    app = create_app(settings)
    if certificate:
        app.parts.metrics.certificate.set_function(certificate.expiry)
    listener = _listen(settings.hostname, settings.port)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_ms / 1000),
    )
    log.info(
        "server.listening", address=f"{settings.hostname}:{settings.port}", version=__version__
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    server = _Server(
        config,
        app,
        certificate,
        connections=_allow_files(settings.max_connections),
        grace=settings.drain_grace_ms / 1000,
    )
    server.run(sockets=[listener])
    log.info("server.stopped")
    return bool(app.lost)


def _allow_files(wanted: int) -> int:
    """Raise this process's limit of open files for `wanted` connections; how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        soft = wanted + _OTHER_FILES if hard == resource.RLIM_INFINITY else hard
        soft = min(soft, wanted + _OTHER_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted + _OTHER_FILES:
        return wanted
    allowed = max(1, soft - _OTHER_FILES)
    log.warning("server.few_files", open_files=soft, connections=allowed, wanted=wanted)
    return allowed


def _listen(hostname: str, port: int) -> socket.socket:
    """A listening socket; raises `StartupError`."""
    try:
        family, *_, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as exc:
        raise StartupError(f"cannot listen on {hostname}:{port}: {exc}") from exc
    return listener
