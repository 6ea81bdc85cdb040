"""`make bench`: the server against the bare session, one table, one machine, one run."""

import json
import platform
import statistics
import sys
from pathlib import Path

import msgspec

from benchmarks.corpus import corpus
from benchmarks.limit import Limit, sweep
from benchmarks.load import bodies, drive
from benchmarks.server import demo_server, tokens_served
from embedding_server.catalog.demo import demo_model
from embedding_server.convert import convert
from embedding_server.core import Ids
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import PackedSession, Session
from embedding_server.runtime.tokenizer import Tokenizer

_SECONDS = 12.0
_WARM_UP_SECONDS = 3.0
_LOADS = {
    "1 text x 1 connection": (1, 1),
    "1 text x 32 connections": (1, 32),
    "1 text x 64 connections": (1, 64),
    "32 texts x 4 connections": (32, 4),
    "128 texts x 2 connections": (128, 2),
}


class Row(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    tokens_per_second: float
    of_limit: float


def main() -> None:
    """Measure the limit, the server, and the limit again; print and store the table."""
    spec, cores, texts = demo_model(), usable_cores(), corpus()
    graph = convert(spec.directory, spec.pooling, Path("~/.cache/embedding-server"))
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    ids = [encoding.ids for encoding in tokenizer.encode(texts)]
    _describe(ids, cores)
    sessions: dict[int, Session] = {
        threads: PackedSession(graph, threads) for threads in sorted({1, cores})
    }
    before = sweep(sessions, ids, cores)
    measured = _serve(texts)
    after = sweep(sessions, ids, cores)
    limit = max(before + after, key=lambda point: point.tokens_per_second)
    _print_sweep(before, after)
    rows = [Row(name, speed, speed / limit.tokens_per_second) for name, speed in measured.items()]
    mean = statistics.mean(map(len, ids))
    print(f"\n{'':28} {'tokens/s':>9} {'texts/s':>8} {'of limit':>9}")
    print(f"{'the limit':28} {limit.tokens_per_second:9.0f} {limit.texts_per_second:8.0f}")
    for row in rows:
        speed = row.tokens_per_second
        print(f"{row.name:28} {speed:9.0f} {speed / mean:8.0f} {row.of_limit:9.2f}")
    Path("benchmarks/results.json").write_bytes(
        msgspec.json.format(msgspec.json.encode({"limit": limit, "rows": rows}))
    )


def _serve(texts: list[str]) -> dict[str, float]:
    """Real tokens per second of each load."""
    speeds = {}
    with demo_server() as url:
        for name, (per_request, connections) in _LOADS.items():
            requests = bodies(demo_model().id, texts, per_request)
            drive(f"{url}/api/embed", requests, connections, _WARM_UP_SECONDS)
            start = tokens_served(url)
            seconds = drive(f"{url}/api/embed", requests, connections, _SECONDS)
            speeds[name] = (tokens_served(url) - start) / seconds
    return speeds


def _describe(ids: list[Ids], cores: int) -> None:
    lengths = sorted(map(len, ids))
    shares = {f"p{share}": lengths[len(lengths) * share // 100] for share in (10, 50, 90, 99)}
    print(f"{platform.processor() or platform.machine()}, {cores} cores, Python {sys.version[:6]}")
    print(f"{len(ids)} texts, mean {statistics.mean(lengths):.1f} tokens, {json.dumps(shares)}")


def _print_sweep(before: list[Limit], after: list[Limit]) -> None:
    print(f"\n{'bare session':28} {'before':>9} {'after':>9}  tokens/s")
    for one, two in zip(before, after, strict=True):
        name = f"{one.slots} x {one.threads} threads, {one.budget} tokens"
        print(f"{name:28} {one.tokens_per_second:9.0f} {two.tokens_per_second:9.0f}")


if __name__ == "__main__":
    main()
