"""Collectors that are there, absent, slow or die, and a real server process."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.server import free_port
from tests.collector import collector, values
from tests.process import Server, server

DEMO = "sentence-transformers/all-MiniLM-L6-v2"
BODY = {"model": DEMO, "text": "Hello, world!"}
REQUESTS = 150


@contextmanager
def traced(endpoint: str, demo: str = "--demo", **env: str) -> Iterator["Traced"]:
    """A server that sends traces and logs there."""
    wanted = {"OTEL_ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    wanted |= {"OTEL_LOGS_ENABLED": "true", "INFERENCE_DRAIN_GRACE_MS": "0"}
    with server(*demo.split(), "--warmup-ms", "0", cwd=None, **(wanted | env)) as client:
        client.until("/health/ready")
        yield Traced(client)


class Traced:
    """A server whose output is read all the time: it says more than a pipe holds."""

    def __init__(self, server: Server) -> None:
        self.get, self.post = server.get, server.post
        self._process = server.process
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        self._lines.extend(self._process.stdout)

    def ended(self) -> tuple[list[dict[str, Any]], float]:
        """Its events, now that it is told to stop, and how long that takes."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(30) == 0
        seconds = time.monotonic() - started
        self._reader.join(10)
        return [json.loads(line) for line in self._lines], seconds


def answered(client: Traced, count: int) -> float:
    """Send so many requests, all of which are answered; the median of their seconds."""
    seconds = []
    for _ in range(count):
        started = time.monotonic()
        assert client.post("/api/embed", json=BODY).status_code == 200
        seconds.append(time.monotonic() - started)
    return sorted(seconds)[count // 2]


def complaints(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was said of the collector."""
    return [event for event in events if event["event"] == "telemetry.unsent"]


def test_everything_is_flushed() -> None:
    """SIGTERM right after requests: their spans and all events are sent before the process ends."""
    with collector() as sink, traced(sink.endpoint, SERVICE_NAME="shop") as client:
        answered(client, 20)
        events, seconds = client.ended()
    assert seconds < 2
    assert len(sink.named("POST /api/embed")) == 20
    assert len(sink.named("run")) == 20
    assert complaints(events) == []
    assert sink.resources[0]["service.name"] == "shop"
    bodies = [record.body.string_value for record in sink.records]
    assert bodies == [event["event"] for event in events]
    assert bodies[-1] == "server.stopped"
    roots = {span.span_id: span.trace_id for span in sink.named("POST /api/embed")}
    records = [record for record in sink.records if record.body.string_value == "request"]
    assert {record.span_id: record.trace_id for record in records} == roots
    said = values(records[0].attributes)
    assert (said["status"], said["model"], said["texts"]) == (200, DEMO, 1)
    assert (records[0].severity_text, records[0].severity_number) == ("info", 9)


def test_absent() -> None:
    """No collector: every request is answered, one line says so, and the end is not held up."""
    with traced(f"http://127.0.0.1:{free_port()}") as client:
        answered(client, REQUESTS)
        time.sleep(2.5)  # several tries
        events, seconds = client.ended()
    assert seconds < 6
    (complaint,) = complaints(events)
    assert "UNAVAILABLE" in complaint["reason"]
    assert sum(event["event"] == "request" for event in events) == REQUESTS


def address(listener: socket.socket) -> str:
    """Where it listens."""
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_slow() -> None:
    """A collector that accepts and never answers: the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent, traced(address(silent)) as client:
        answered(client, REQUESTS)
        time.sleep(6)  # longer than an export may take
        answered(client, 10)
        events, seconds = client.ended()
    assert seconds < 6
    assert len(complaints(events)) == 1


def test_dies_and_comes_back() -> None:
    """While a collector is away nothing but its spans is lost, and it is found again."""
    port = free_port()
    with traced(f"http://127.0.0.1:{port}") as client:
        with collector(port) as first:
            answered(client, 5)
            first.until(lambda: len(first.named("POST /api/embed")) == 5)
        answered(client, REQUESTS)
        with collector(port) as second:
            deadline = time.monotonic() + 20
            while not second.named("POST /api/embed"):
                answered(client, 1)
                time.sleep(0.1)
                assert time.monotonic() < deadline
            events, _ = client.ended()
    assert len(complaints(events)) <= 1
    assert all(event["status"] == 200 for event in events if event["event"] == "request")


def test_off_loads_nothing() -> None:
    """Unless it is wanted, neither OpenTelemetry nor gRPC is mapped into the process."""
    with server("--demo", "--warmup-ms", "0") as client:
        client.until("/health/live")
        with open(f"/proc/{client.process.pid}/maps") as maps:
            assert "cygrpc" not in maps.read()


@pytest.mark.parametrize("flag", ["--otel-endpoint", "--otel-sample-ratio"])
def test_mistakes_are_one_line(flag: str) -> None:
    """A wrong value ends the process with status 2."""
    with server("--demo", "--otel-enabled", "--otel-logs-enabled", flag, "7") as client:
        output, _ = client.process.communicate(timeout=30)
    assert client.process.returncode == 2
    assert len(output.splitlines()) == 1
