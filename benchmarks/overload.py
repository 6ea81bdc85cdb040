"""`make bench-overload`: what happens at ten times the load that the server can carry.

Everything stays on loopback and is bounded in count and time. Results are printed and stored in
`overload.json` beside this file.
"""

import contextlib
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from benchmarks import openloop
from benchmarks.corpus import corpus
from benchmarks.latency import p99, short, single
from benchmarks.load import bodies, drive
from benchmarks.openloop import Order, Outcome
from benchmarks.server import Server, demo_server, gauge, tokens_served
from embedding_server.catalog.demo import demo_model
from embedding_server.runtime.tokenizer import Tokenizer

_RESULTS = Path(__file__).with_name("overload.json")
_TIMES, _BULK = 10, 32
"""How many times the load it can carry, and texts per bulk request."""
_CONNECTIONS = {_BULK: 4, 1: 64}
"""Texts per request -> connections of the closed loop that reaches the peak."""
_PEAK_SECONDS, _OVERLOAD_SECONDS, _SINGLES_SECONDS, _FAIR_SECONDS = 10.0, 60.0, 20.0, 20.0
_SETTLE_SECONDS = 3.0
_LATE_SECONDS = 4.5
"""A refusal after so long is one by timeout in line."""
_LARGE_BYTES, _LARGE_CLIENTS = 8 << 20, 64
_HANG_UPS, _HANG_UPS_AT_ONCE = 1000, 100
_POLITE = "127.0.0.2"

T = TypeVar("T")


class Overload(msgspec.Struct, frozen=True, kw_only=True):
    """Ten times the load; times in seconds."""

    offered: float
    """Requests per second that were sent."""
    goodput: float
    """Tokens per second of the requests that were answered, of the closed-loop peak around it."""
    statuses: dict[int, int]
    without_retry_after: int
    refusal_p99: float
    refused_after_waiting: float
    """Refusals by timeout in line, of all refusals."""
    prediction_error: float
    """Median of |wait / predicted - 1| of those who waited."""
    beyond_prediction: float
    """99th percentile of what they waited beyond 1.25 times the prediction."""
    probe_p99: float
    generator_cpu: float
    memory: float
    """Peak resident memory, of the peak at the load it can carry."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    peaks: dict[int, float]
    """Texts per request -> tokens per second of a closed loop."""
    bulk: Overload
    singles: Overload
    obedient: float
    """Served within three tries, of clients that obey Retry-After after a burst of 2x."""
    large_bodies_mb: float
    """Growth of resident memory with 64 clients that send 8 MB each."""
    polite_share: dict[str, float]
    """Flood -> share of all tokens of a client with 4 connections x 32 texts beside it."""
    leaked: dict[str, float]
    """What is left inside after 1,000 hang-ups."""
    loading_p99: tuple[float, float]
    """Milliseconds of a short text without, and while another model is converted and loaded."""
    lost_at_shutdown: int
    answered_at_shutdown: dict[int, int]


def main() -> None:
    """Measure everything, print it and store it."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        with (
            log.open("w") as out,
            demo_server("--drain-grace-ms", "2000", log=out.fileno()) as server,
        ):
            stored = msgspec.json.format(msgspec.json.encode(_measure(server, log)))
    print(stored.decode(), flush=True)
    _RESULTS.write_bytes(stored)


def _measure(server: Server, log: Path) -> Result:
    spec, texts = demo_model(), corpus()
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    lengths = [len(encoding.item) for encoding in tokenizer.encode(texts)]
    requests = {size: bodies(spec.id, texts, size) for size in _CONNECTIONS}
    tokens = {size: [sum(group) for group in _groups(lengths, size)] for size in _CONNECTIONS}

    def peak(size: int) -> float:
        return _peak(server, requests[size], _CONNECTIONS[size])

    with server.peak_mb() as memory:
        peaks = {size: peak(size) for size in _CONNECTIONS}

    def order(size: int, times: float, seconds: float, tries: int = 1) -> Order:
        return Order(
            url=f"{server.url}/api/embed",
            bodies=requests[size],
            rate=times * peaks[size] / statistics.mean(tokens[size]),
            seconds=seconds,
            tries=tries,
        )

    def overload(size: int, seconds: float) -> Overload:
        before = peak(size)
        found = _overload(server, order(size, _TIMES, seconds), tokens[size], memory[0], log)
        around = (before + peak(size)) / 2
        return msgspec.structs.replace(found, goodput=found.goodput / around)

    def polite(size: int) -> float:
        return _polite_share(server, spec.id, texts, order(size, _TIMES, _FAIR_SECONDS))

    bulk, singles = overload(_BULK, _OVERLOAD_SECONDS), overload(1, _SINGLES_SECONDS)
    obedient = openloop.send(order(_BULK, 2.0, 10.0, tries=3))
    shares = {"bulk": polite(_BULK), "singles": polite(1)}
    leaked = _hang_ups(server, requests[_BULK])
    end = _shutdown(server, order(_BULK, 1.0, 10.0))
    return Result(
        peaks=peaks,
        bulk=bulk,
        singles=singles,
        obedient=obedient.count(200) / len(obedient.answers),
        large_bodies_mb=_large_bodies(spec.id),
        polite_share=shares,
        leaked=leaked,
        loading_p99=_beside_loading(),
        lost_at_shutdown=end.count(0),
        answered_at_shutdown=Counter(answer.status for answer in end.answers),
    )


def _groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _peak(server: Server, requests: Sequence[str], connections: int) -> float:
    """Tokens per second of a closed loop."""
    drive(f"{server.url}/api/embed", requests, connections, _SETTLE_SECONDS)
    before = tokens_served(server.url)
    seconds = drive(f"{server.url}/api/embed", requests, connections, _PEAK_SECONDS).seconds
    return (tokens_served(server.url) - before) / seconds


def _overload(
    server: Server, order: Order, tokens: Sequence[int], memory: float, log: Path
) -> Overload:
    """An overload, with its goodput in tokens per second; `tokens` are those of each body."""
    seen = log.stat().st_size
    with server.peak_mb() as peaks, _probes(server) as probes:
        outcome = openloop.send(order)
    refused = [answer for answer in outcome.answers if answer.status == 503]
    late = sum(answer.seconds > _LATE_SECONDS for answer in refused)
    waits = _waits(log, seen)
    answered = sum(
        tokens[one.body]
        for one in outcome.answers
        if one.status == 200 and _SETTLE_SECONDS <= one.at + one.seconds < order.seconds
    )
    return Overload(
        offered=outcome.rate,
        goodput=answered / (order.seconds - _SETTLE_SECONDS),
        statuses=Counter(answer.status for answer in outcome.answers),
        without_retry_after=sum(answer.retry_after is None for answer in refused),
        refusal_p99=p99([one.seconds for one in refused if one.seconds <= _LATE_SECONDS]),
        refused_after_waiting=late / max(1, len(refused)),
        prediction_error=statistics.median(abs(waited / said - 1) for waited, said in waits),
        beyond_prediction=p99([waited - 1.25 * said for waited, said in waits]),
        probe_p99=p99(probes) if probes else math.inf,
        generator_cpu=outcome.cpu,
        memory=peaks[0] / memory,
    )


def _waits(log: Path, seen: int) -> list[tuple[float, float]]:
    """Seconds in line and what was predicted for it, of the answered requests in the log."""
    with log.open() as lines:
        lines.seek(seen)
        events = [json.loads(line) for line in lines if '"predicted_queue_ms"' in line]
    return [
        (event["queue_ms"] / 1000, max(event["predicted_queue_ms"], 1) / 1000) for event in events
    ]


@contextlib.contextmanager
def _probes(server: Server) -> Iterator[list[float]]:
    """Seconds that probes take, ten a second, on a connection each, as Kubernetes does."""
    times: list[float] = []
    done = threading.Event()

    def probe() -> None:
        while not done.wait(0.1):
            for path in ("/health/live", "/health/ready"):
                started, ok = time.perf_counter(), False
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
                    connection.request("GET", path)
                    ok = connection.getresponse().status == http.client.OK
                    connection.close()
                times.append(time.perf_counter() - started if ok else math.inf)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield times
    finally:
        done.set()
        prober.join()


def _large_bodies(model: str) -> float:
    """MiB that 64 clients at once, who send 8 MB each, add to a fresh server."""
    text = "word " * (_LARGE_BYTES // 5)
    with demo_server() as server:
        order = Order(
            url=f"{server.url}/api/embed",
            bodies=[json.dumps({"model": model, "text": text})],
            rate=_LARGE_CLIENTS * 100,
            seconds=0.01,
        )
        _post(server.url, short(model))
        before = server.resident_mb
        with server.peak_mb() as memory:
            openloop.send(order)
        return memory[0] - before


def _polite_share(server: Server, model: str, texts: Sequence[str], flood: Order) -> float:
    """Of all tokens, those of a client of its own address that has 4 requests out at most."""
    groups = _groups(texts, _BULK)
    done = threading.Event()

    def work(number: int) -> int:
        transport, tokens, at = httpx.HTTPTransport(local_address=_POLITE), 0, number
        with httpx.Client(transport=transport, timeout=60) as client:
            while not done.is_set():
                body = {
                    "model": model,
                    "input": list(groups[at % len(groups)]),
                    "encoding_format": "base64",
                }
                answer = client.post(f"{server.url}/v1/embeddings", json=body)
                if answer.is_success:
                    tokens += answer.json()["usage"]["total_tokens"]
                else:
                    done.wait(int(answer.headers["retry-after-ms"]) / 1000)
                at += 4
        return tokens

    with openloop.running(flood) as load, ThreadPoolExecutor(4) as pool:
        time.sleep(_SETTLE_SECONDS)
        before = tokens_served(server.url)
        polite = [pool.submit(work, number) for number in range(4)]
        time.sleep(flood.seconds - 2 * _SETTLE_SECONDS)
        done.set()
        tokens = sum(one.result() for one in polite)
        total = tokens_served(server.url) - before
        openloop.outcome(load)
    return tokens / total


def _hang_ups(server: Server, requests: Sequence[str]) -> dict[str, float]:
    """What 1,000 clients that hang up at random moments leave behind."""
    permits = httpx.get(f"{server.url}/health/status").json()["available_permits"]
    address = urlsplit(server.url)
    chance = random.Random(0)

    def call(seconds: float) -> None:
        body = requests[int(seconds * 1e6) % len(requests)].encode()
        head = "POST /api/embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(seconds)

    with ThreadPoolExecutor(_HANG_UPS_AT_ONCE) as pool:
        list(pool.map(call, [chance.uniform(0, 0.5) for _ in range(_HANG_UPS)]))
    time.sleep(1.0)
    status = httpx.get(f"{server.url}/health/status").json()
    return {
        "admitted": gauge(server.url, "inference_admitted_requests"),
        "waiting": status["total_queue_depth"],
        "texts in line": sum(model["queue"] for model in status["models"].values()),
        "permits": permits - status["available_permits"],
    }


def _beside_loading() -> tuple[float, float]:
    """Milliseconds, 99th percentile, alone and beside the load of another model."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("one", "two"):
            Path(scratch, "models").mkdir(exist_ok=True)
            Path(scratch, "models", name).symlink_to(demo_model().directory)
        flags = ["--model-path", f"{scratch}/models", "--allowed-embedding-models", "one,two"]
        flags += ["--preload", "one", "--cache-dir", f"{scratch}/cache"]
        with demo_server(*flags) as server, ThreadPoolExecutor(1) as pool:
            alone = single(server.url, short("one"), 300)
            # Its graph is the first one's, whose conversion is to be part of the load.
            shutil.rmtree(f"{scratch}/cache")
            loading, beside = pool.submit(_post, server.url, short("two")), []
            while not loading.done():
                beside += single(server.url, short("one"), 5)
            loading.result()
    return p99(alone), p99(beside)


def _shutdown(server: Server, order: Order) -> Outcome:
    """SIGTERM in the middle of the load that the server can carry."""
    with openloop.running(order) as load:
        time.sleep(order.seconds / 2)
        os.kill(server.pid, signal.SIGTERM)
        return openloop.outcome(load)


def _post(url: str, body: str) -> None:
    """A request that is answered, sooner or later."""
    headers = {"Content-Type": "application/json"}
    while True:
        answer = httpx.post(f"{url}/api/embed", content=body, headers=headers, timeout=60)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(int(answer.headers["retry-after-ms"]) / 1000)
    answer.raise_for_status()


if __name__ == "__main__":
    main()
