"""Raw connections to a real server: pipelining, large answers, clients that vanish."""

import io
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
