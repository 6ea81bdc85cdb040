"""`make bench`: the limit, our server, its schedule and its peers, in one run on one machine."""

import json
import statistics
import sys
from pathlib import Path

from benchmarks import latency
from benchmarks.corpus import corpus
from benchmarks.graphs import speedups
from benchmarks.invariance import largest_difference
from benchmarks.latency import Latency
from benchmarks.limit import BUDGETS, sweep
from benchmarks.load import bodies, drive
from benchmarks.peers import peers
from benchmarks.report import Report, Row, show, store
from benchmarks.server import demo_server, tokens_served
from benchmarks.simulate import ceiling, modelled_limit, planning_seconds
from embedding_server.catalog.demo import demo_model
from embedding_server.convert import convert
from embedding_server.core import Ids
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import PackedSession
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.profile import device_name, measure

_SECONDS, _WARM_UP_SECONDS = 12.0, 3.0
_BUDGET = 512
_LOADS = {
    "1 text x 1 connection": (1, 1),
    "1 text x 32 connections": (1, 32),
    "1 text x 64 connections": (1, 64),
    "32 texts x 4 connections": (32, 4),
    "128 texts x 2 connections": (128, 2),
}
_IN_FLIGHT = (1, 8, 32, 64, 128)


def main() -> None:
    """Measure everything, print it and store it."""
    spec, cores, texts = demo_model(), usable_cores(), corpus()
    graph = convert(spec.directory, spec.pooling, Path("~/.cache/embedding-server"))
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    ids = [encoding.ids for encoding in tokenizer.encode(texts)]
    (short,) = tokenizer.encode([latency.SHORT])
    session = PackedSession(graph, cores)
    cost = measure(session, spec.max_tokens, 3.0)
    before = sweep(session, ids, cores)
    with demo_server() as url:
        speeds = _serve(url, texts)
        waits: Latency = latency.measure(url, spec.id, session, short.ids, texts)
    after = sweep(session, ids, cores)
    limit = modelled_limit(ids, cost, cores, BUDGETS)
    ceilings = {count: ceiling(ids, cost, count, cores, _BUDGET) / limit for count in _IN_FLIGHT}
    best = max(point.tokens_per_second for point in before + after)
    mean = statistics.mean(map(len, ids))

    def row(name: str, speed: float) -> Row:
        per_request, connections = _LOADS[name]
        # A lone text runs on all cores, which the simulation does not know.
        in_flight = connections if per_request == 1 else 128
        simulated = ceilings[in_flight] if in_flight > 1 else None
        share = speed / best
        return Row(name, speed, speed / mean, share, share / simulated if simulated else None)

    report = Report(
        machine=f"{device_name()}, {cores} cores, Python {sys.version.split()[0]}",
        corpus=_describe(ids),
        before=before,
        after=after,
        rows=[row(name, speed) for name, speed in speeds.items()],
        ceilings=ceilings,
        peers=peers(spec, texts, cores),
        latency=waits,
        planning_ms=planning_seconds(20_000, _BUDGET) * 1000,
        speedups=speedups(session, spec.directory),
        neighbours=largest_difference(session, ids),
    )
    show(report)
    store(report)


def _serve(url: str, texts: list[str]) -> dict[str, float]:
    """Real tokens per second of each load."""
    speeds = {}
    for name, (per_request, connections) in _LOADS.items():
        requests = bodies(demo_model().id, texts, per_request)
        drive(f"{url}/api/embed", requests, connections, _WARM_UP_SECONDS)
        start = tokens_served(url)
        seconds = drive(f"{url}/api/embed", requests, connections, _SECONDS)
        speeds[name] = (tokens_served(url) - start) / seconds
    return speeds


def _describe(ids: list[Ids]) -> str:
    lengths = sorted(map(len, ids))
    shares = {f"p{share}": lengths[len(lengths) * share // 100] for share in (10, 50, 90, 99)}
    return f"{len(ids)} texts, mean {statistics.mean(lengths):.1f} tokens, {json.dumps(shares)}"


if __name__ == "__main__":
    main()
