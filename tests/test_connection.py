"""Raw connections to a real server: pipelining, large answers, clients that vanish or attack."""

import io
import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from embedding_server.server.connection import Connection, Door
from tests.process import Server, server


@pytest.fixture
def running(models: Path, cache: Path) -> Iterator[Server]:
    """A server of the tiny model."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    with server(*flags, "--cache-dir", str(cache), "--warmup-ms", "0") as one:
        one.until("/health/ready")
        yield one


def post(texts: list[str], name: str) -> bytes:
    """An embed request with a request id."""
    body = json.dumps({"model": "tiny", "input": texts}).encode()
    head = f"POST /api/embed HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(running: Server) -> socket.socket:
    """A connection."""
    return socket.create_connection((running.base_url.host, running.base_url.port or 0), 30)


def read(stream: io.BufferedReader) -> tuple[int, dict[str, str], Any]:
    """The next answer: status, headers in lower case, JSON body."""
    status = int(stream.readline().split()[1])
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    return status, headers, json.loads(stream.read(int(headers["content-length"])))


def answer(stream: io.BufferedReader) -> tuple[str, int]:
    """The next answer's request id and number of vectors."""
    _, headers, body = read(stream)
    return headers["x-request-id"], len(body["embeddings"])


def test_pipelined_requests(running: Server) -> None:
    """Requests sent at once on one connection are answered whole and in order."""
    with connect(running) as one, one.makefile("rb") as stream:
        one.sendall(b"".join(post(["a"] * (at + 1), f"r{at}") for at in range(5)))
        assert [answer(stream) for _ in range(5)] == [(f"r{at}", at + 1) for at in range(5)]


def test_slow_reader(running: Server) -> None:
    """An answer larger than any buffer arrives whole at a client that reads late."""
    with connect(running) as one, one.makefile("rb") as stream:
        for at in range(20):
            one.sendall(post(["a", "b"] * 64, f"r{at}"))
        time.sleep(0.3)
        assert [answer(stream) for _ in range(20)] == [(f"r{at}", 128) for at in range(20)]


def test_vanishing_clients(running: Server) -> None:
    """Connections that are reset at any moment leave no trace but a log line, and no error."""
    for at in range(30):
        with connect(running) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.sendall(post(["a", "b"] * 64, f"r{at}"))
            time.sleep(at * 1e-3)
    assert running.get("/health/ready").is_success
    running.process.terminate()
    log, _ = running.process.communicate(timeout=30)
    assert "Traceback" not in log
    assert '"level":"error"' not in log


def test_options_of_the_server(running: Server) -> None:
    """`OPTIONS *`, whose path has no slash, is answered in the native shape."""
    with connect(running) as one, one.makefile("rb") as stream:
        one.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
        status, _, body = read(stream)
    assert status in (400, 404)
    assert set(body) == {"error", "code", "request_id"}


def reply(running: Server, sent: bytes, *more: bytes, pause: float = 0.05) -> bytes:
    """All that a connection answers to these bytes until the server closes it."""
    with connect(running) as one:
        one.settimeout(20)
        one.sendall(sent)
        for part in more:
            time.sleep(pause)
            one.sendall(part)
        answered = b""
        while part := one.recv(65536):
            answered += part
    return answered


def refusal(answered: bytes) -> tuple[int, dict[str, str]]:
    """Status and body of one refusal, after a check of its form."""
    with io.BytesIO(answered) as raw:
        status, headers, body = read(raw)  # type: ignore[arg-type]
        assert not raw.read()
    assert set(body) == {"error", "code", "request_id"}
    assert body["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"
    assert headers["x-content-type-options"] == "nosniff"
    return status, body


HEAD = b"POST /api/embed HTTP/1.1\r\nHost: x\r\n"


NO_REQUESTS = [
    (b"garbage\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
    (b"CONNECT x:1 HTTP/1.1\r\n\r\n", 400),
    (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    (HEAD + b"Content-Length: 1e3\r\n\r\n", 400),
    (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
    (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", 400),
    (HEAD + b"X: a\0b\r\n\r\n", 400),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET /" + b"a" * 500_000, 414),
    (HEAD + b"X: " + b"a" * 66_000 + b"\r\n\r\n", 431),
    (HEAD + b"X: " + b"a" * 500_000, 431),
    (HEAD + b"X: a\r\n" * 200 + b"\r\n", 431),
    (HEAD + b"X: a\r\n" * 200_000, 431),
]


def test_no_requests(running: Server) -> None:
    """What is no request, or too long for one, gets an answer in the native shape."""
    for sent, status in NO_REQUESTS:
        cut = len(sent) // 2
        assert refusal(reply(running, sent[:cut], sent[cut:]))[0] == status, sent[:80]


def test_refusals_are_no_errors(running: Server) -> None:
    """Strangers' nonsense leaves nothing in the log at a level that wakes anybody."""
    for _ in range(3):
        reply(running, b"garbage\r\n\r\n")
        with connect(running) as one, one.makefile("rb") as stream:
            one.sendall(b"GET /health/live HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
            assert read(stream)[0] == 200
    assert running.get("/health/live").is_success
    running.process.terminate()
    log, _ = running.process.communicate(timeout=30)
    levels = {json.loads(line)["level"] for line in log.splitlines()}
    assert levels == {"info"}, log
    assert log.count('"connection.refused"') == 3


def test_garbage_behind_requests(running: Server) -> None:
    """Requests that came before it are answered whole and in order; then the connection closes."""
    sent = b"".join(post(["a"] * (at + 1), f"r{at}") for at in range(5))
    with io.BytesIO(reply(running, sent + b"garbage\r\n\r\n")) as raw:
        stream: Any = raw
        assert [answer(stream) for _ in range(5)] == [(f"r{at}", at + 1) for at in range(5)]
        assert not raw.read()
    bad = HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n"
    with io.BytesIO(reply(running, sent + bad)) as raw:
        stream = raw
        assert [answer(stream) for _ in range(5)] == [(f"r{at}", at + 1) for at in range(5)]
        assert not raw.read()


def test_slow_requests(running: Server) -> None:
    """A head that does not end is a 408, and so is a body that stops.

    A connection that says nothing is closed without an answer, as is one whose request goes on
    behind its answer.
    """
    drip = HEAD + b"X-Slow: "
    half = HEAD + b"Content-Length: 50\r\n\r\n{"
    refused = HEAD + b"Content-Length: 99999999\r\n\r\n"
    with ThreadPoolExecutor() as pool:
        began = time.monotonic()
        dripping = pool.submit(reply, running, drip, *[b"a"] * 11, pause=0.9)
        behind = pool.submit(reply, running, post(["a"], "r0") + drip)
        silent = pool.submit(reply, running, b"")
        blank = pool.submit(reply, running, b"\r\n\r\n")
        stopped = pool.submit(reply, running, half)
        large = pool.submit(reply, running, refused, *[b"a"] * 8, pause=1)
        assert refusal(dripping.result())[0] == 408
        first, second = behind.result().split(b"HTTP/1.1 408", 1)
        assert b"HTTP/1.1 200" in first
        assert b"REQUEST_TIMEOUT" in second
        assert silent.result() == blank.result() == b""
        status, body = refusal(stopped.result())
        assert (status, body["code"]) == (408, "REQUEST_TIMEOUT")
        assert b"HTTP/1.1 413" in large.result()
        assert 9 < time.monotonic() - began < 15


def test_blank_lines_do_not_keep_a_connection(running: Server) -> None:
    """Nothing but a request stops the clock of an idle connection."""
    with connect(running) as one, one.makefile("rb") as stream:
        one.sendall(b"GET /health/live HTTP/1.1\r\n\r\n\r\n")
        assert read(stream)[0] == 200
        one.sendall(b"\r\n\r\nGET /health/live HTTP/1.1\r\n\r\n")
        assert read(stream)[0] == 200


def test_too_many_connections(models: Path, cache: Path) -> None:
    """Those beyond the limit get a 503 in their dialect, probes their answer; then all is well."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    flags += ["--cache-dir", str(cache), "--warmup-ms", "0", "--max-connections", "5"]
    page = {"Origin": "https://a.example"}
    with server(*flags) as one:
        one.until("/health/ready")
        url = str(one.base_url)
        held = [connect(one) for _ in range(4)]  # beside that of the client
        for path in ("/health/live", "/health/ready", "/metrics"):
            answered = httpx.get(url + path)
            assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        for _ in range(3):
            full = httpx.post(f"{url}/api/embed", json={"model": "tiny", "text": "a"}, headers=page)
            assert full.status_code == 503
            assert full.json()["code"] == "SERVICE_UNAVAILABLE"
            assert "too many connections" in full.json()["error"]
            assert full.headers["connection"] == "close"
            assert full.headers["access-control-allow-origin"] == "*"
            assert 1 <= int(full.headers["retry-after"]) <= 60
        assert "error" in httpx.post(f"{url}/v1/embeddings", json={}).json()
        assert one.post("/api/embed", json={"model": "tiny", "text": "a"}).status_code == 200
        metrics = one.get("/metrics").text
        assert 'inference_rejections_total{reason="connections"} 4.0' in metrics
        for each in held:
            each.close()
        time.sleep(0.1)
        assert httpx.post(f"{url}/api/embed", json={"model": "tiny", "text": "a"}).is_success


def test_a_flood_of_connections(models: Path, cache: Path) -> None:
    """Beyond those that get a 503 connections are closed at once; afterwards the server serves."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    flags += ["--cache-dir", str(cache), "--warmup-ms", "0", "--max-connections", "5"]
    with server(*flags) as one:
        one.until("/health/ready")
        held = [connect(one) for _ in range(300)]
        assert one.get("/health/live").is_success
        gone = 0
        for each in held:
            each.settimeout(0.01)
            with suppress(TimeoutError):
                try:
                    gone += not each.recv(1)
                except ConnectionResetError:
                    gone += 1
        assert gone >= 300 - 4 - 256
        for each in held:
            each.close()
        assert one.until("/health/ready")


class FakeTransport:
    """A transport whose peer takes nothing."""

    unsent = 0
    aborted = False

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


async def test_unread_answers() -> None:
    """An answer of which nothing is taken for half a minute ends its connection."""
    config = uvicorn.Config(lambda: None, http="httptools", log_config=None, lifespan="off")
    queue: Any = None  # nobody is refused
    connection = Connection(config, ServerState(), {}, Door(10, queue, None))
    transport: Any = FakeTransport()
    connection.connection_made(transport)
    for now, unsent, aborted in (
        (0.0, 0, False),
        (100.0, 0, False),
        (101.0, 500, False),
        (130.0, 500, False),
        (131.0, 400, False),
        (160.0, 400, False),
        (162.0, 400, True),
    ):
        transport.unsent = unsent
        connection.look(now)
        assert transport.aborted is aborted, now
