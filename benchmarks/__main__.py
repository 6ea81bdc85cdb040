"""`make bench`: the limit, our server, its schedule and its peers, in one run on one machine."""

import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import latency
from benchmarks.corpus import corpus
from benchmarks.graphs import speedups
from benchmarks.invariance import largest_difference
from benchmarks.limit import BUDGETS, Limit, measure, sweep
from benchmarks.loads import in_flight, loads, shares
from benchmarks.peers import peers
from benchmarks.report import Report, Row, show, store
from benchmarks.server import demo_server
from benchmarks.simulate import ceiling, modelled_limit, planning_seconds
from benchmarks.variants import against_default, three_models, trades
from embedding_server.catalog.demo import demo_model
from embedding_server.convert import convert
from embedding_server.core import Ids
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import PackedSession
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving import profile
from embedding_server.serving.profile import device_name
from embedding_server.serving.texts import JUDGEMENT
from embedding_server.serving.tuning import Way

_LIMIT_TEXTS = 500
"""A pass over so many is one measurement of the limit."""
_MIXED = 24
_IN_FLIGHT = (1, 8, 32, 64, 128)


def main() -> None:
    """Measure everything, print it and store it."""
    spec, cores, texts = demo_model(), usable_cores(), corpus()
    graph = convert(spec.directory, spec.pooling, Path("~/.cache/embedding-server"))
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    ids, judged, (short,) = (
        [encoding.ids for encoding in tokenizer.encode(group)]
        for group in (texts, JUDGEMENT, [latency.SHORT])
    )
    session = PackedSession(graph, cores)
    cost = profile.measure(session, spec.max_tokens, 3.0, cores)
    part = ids[:_LIMIT_TEXTS]
    before = sweep(session, part, cores)
    best = max(before, key=_speed)
    limit = partial(measure, session, part, best.budget, best.slots, best.threads)
    with demo_server():  # converts and measures, so that the next start does not
        pass
    with demo_server() as server:
        found = shares(server.url, loads(server.url, spec.id, texts), lambda: _speed(limit()))
        waits = latency.measure(server.url, spec.id, session, short, texts)
    after = sweep(session, part, cores)
    top = max(map(_speed, before + after))
    mean = statistics.mean(map(len, ids))
    ideal = modelled_limit(ids, cost, cores, BUDGETS)
    ceilings = {
        count: ceiling(ids, cost, count, cores, Way().batch_tokens) / ideal for count in _IN_FLIGHT
    }

    def row(name: str, speed: float, share: float) -> Row:
        # A lone text runs on all cores, which the simulation does not know.
        simulated = ceilings[min(in_flight(name), max(_IN_FLIGHT))] if in_flight(name) > 1 else None
        return Row(
            name=name,
            tokens_per_second=speed,
            texts_per_second=speed / mean,
            of_best_limit=speed / top,
            of_limit_beside=share,
            of_ceiling=share / simulated if simulated else None,
        )

    report = Report(
        machine=f"{device_name()}, {cores} cores, Python {sys.version.split()[0]}",
        corpus=_describe(ids),
        before=before,
        after=after,
        rows=[row(name, *pair) for name, pair in found.items()],
        ceilings=ceilings,
        peers=peers(spec, texts, cores),
        latency=waits,
        start_seconds=server.start_seconds,
        planning_ms={
            name: planning_seconds(20_000, padded=padded) * 1000
            for name, padded in (("packed", False), ("padded", True))
        },
        speedups=speedups(session, spec.directory),
        neighbours=largest_difference(session, ids),
        variants={
            "three models at once, of one": three_models(spec, texts),
            "int8, of fp32": against_default(spec, texts, "--precision", "int8"),
            "reproducible, of not": against_default(spec, texts, "--reproducible", "true"),
        },
        trades=trades(spec, session, _mixed(ids), judged),
    )
    show(report)
    store(report)


def _speed(limit: Limit) -> float:
    return limit.tokens_per_second


def _mixed(ids: list[Ids]) -> list[Ids]:
    chosen = np.random.default_rng(0).choice(len(ids), _MIXED, replace=False)
    return [ids[at] for at in chosen]


def _describe(ids: list[Ids]) -> str:
    lengths = sorted(map(len, ids))
    shares = {f"p{share}": lengths[len(lengths) * share // 100] for share in (10, 50, 90, 99)}
    return f"{len(ids)} texts, mean {statistics.mean(lengths):.1f} tokens, {json.dumps(shares)}"


if __name__ == "__main__":
    main()
