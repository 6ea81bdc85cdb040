"""What one client waits: alone, and while bulk keeps the server busy."""

import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import msgspec

from benchmarks.load import bodies, drive
from benchmarks.server import median_run_seconds
from embedding_server.core import Ids
from embedding_server.runtime.session import Session

SHORT = "How do I measure the latency of one short text?"
_REQUESTS, _MIXED_REQUESTS = 300, 200
_BULK_SECONDS = 25


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds."""

    bare_median: float
    alone_median: float
    alone_p99: float
    mixed_median: float
    mixed_p99: float
    bulk_run_median: float


def measure(url: str, model: str, session: Session, ids: Ids, texts: Sequence[str]) -> Latency:
    """A short text against the bare session, alone on the server, and beside bulk."""
    bare = _times(lambda: session.run([ids], wide=True), _REQUESTS)
    body = short(model)
    alone = single(url, body, _REQUESTS)
    requests = bodies(model, texts, 32)
    bulk = threading.Thread(target=drive, args=(f"{url}/api/embed", requests, 4, _BULK_SECONDS))
    bulk.start()
    time.sleep(1.0)
    run = median_run_seconds(url, lambda: time.sleep(4.0))
    mixed = single(url, body, _MIXED_REQUESTS)
    if not bulk.is_alive():
        raise RuntimeError("bulk ended before the single texts did")
    bulk.join()
    return Latency(
        bare_median=statistics.median(bare),
        alone_median=statistics.median(alone),
        alone_p99=p99(alone),
        mixed_median=statistics.median(mixed),
        mixed_p99=p99(mixed),
        bulk_run_median=run * 1000,
    )


def short(model: str) -> str:
    """The body of a request for a short text."""
    return json.dumps({"model": model, "text": SHORT})


def single(url: str, body: str, count: int) -> list[float]:
    """Milliseconds of so many requests, one after the other."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def post() -> None:
        connection.request("POST", "/api/embed", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(answer.status)

    times = _times(post, count)
    connection.close()
    return times


def _times(work: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1000)
    return times


def p99(times: Sequence[float]) -> float:
    """The 99th percentile; 0 of none."""
    return sorted(times)[len(times) * 99 // 100] if times else 0.0
