"""`make bench`: the limit, our server, its schedule and its peers, in one run on one machine."""

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import latency
from benchmarks.corpus import corpus
from benchmarks.graphs import speedups
from benchmarks.invariance import largest_difference
from benchmarks.limit import again, speed, sweep
from benchmarks.loads import BesideLimit, in_flight, loads, shares
from benchmarks.peers import peers
from benchmarks.report import Report, Row, show, store
from benchmarks.server import demo_server
from benchmarks.simulate import ceiling, modelled_limit, planning_seconds
from benchmarks.variants import against_default, three_models, trades
from embedding_server.catalog.demo import demo_model
from embedding_server.convert import convert
from embedding_server.core import Ids, ModelSpec
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import OnnxSession
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.profile import device_name, stored
from embedding_server.serving.texts import JUDGEMENT

_LIMIT_TEXTS = 300
"""A pass over so many is one measurement of the limit."""
_MIXED = 24
_IN_FLIGHT = (1, 8, 32, 64, 128)


def main() -> None:
    """Measure everything, print it and store it."""
    spec, cores, texts = demo_model(), usable_cores(), corpus()
    with TemporaryDirectory() as cache:
        report = _measure(spec, cores, texts, Path(cache))
    show(report)
    store(report)


def _measure(spec: ModelSpec, cores: int, texts: list[str], cache: Path) -> Report:
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    ids, judged, (short,) = (
        [encoding.item for encoding in tokenizer.encode(group)]
        for group in (texts, JUDGEMENT, [latency.SHORT])
    )
    lengths = list(map(len, ids))
    mean, part = statistics.mean(lengths), ids[:_LIMIT_TEXTS]
    with demo_server("--cache-dir", str(cache)):  # converts and measures
        pass
    (profile,) = filter(None, map(stored, cache.glob("profiles/*.json")))
    session = OnnxSession(convert(spec, cache), cores)
    before = sweep(session, part, cores)
    best = max(before, key=speed)
    beside_limit = BesideLimit(partial(again, session, part, before))
    with demo_server("--cache-dir", str(cache)) as server:
        ours = shares(server.url, loads(server.url, spec.id, texts), beside_limit)
        waits = latency.measure(server.url, spec.id, session, short, texts)
    theirs = peers(spec, texts, lengths, cores, beside_limit)
    after = sweep(session, part, cores)
    top = max(map(speed, before + after))
    ideal = modelled_limit(ids, profile.cost, cores, best.budget)
    ceilings = {
        count: ceiling(ids, profile.cost, count, cores, profile.way.batch_tokens) / ideal
        for count in _IN_FLIGHT
    }

    def row(name: str, found: tuple[float, float], simulated: float | None = None) -> Row:
        return Row(
            name=name,
            tokens_per_second=found[0],
            texts_per_second=found[0] / mean,
            of_best_limit=found[0] / top,
            of_limit_beside=found[1],
            of_ceiling=found[1] / simulated if simulated else None,
        )

    def simulated(name: str) -> float | None:
        # A lone text runs on all cores, which the simulation does not know.
        return ceilings[min(in_flight(name), max(_IN_FLIGHT))] if in_flight(name) > 1 else None

    return Report(
        machine=f"{device_name()}, {cores} cores, Python {sys.version.split()[0]}",
        corpus=_describe(lengths),
        mean_tokens=mean,
        profile=profile,
        before=before,
        after=after,
        rows=[row(name, found, simulated(name)) for name, found in ours.items()],
        ceilings=ceilings,
        peers={name: found and row(name, found) for name, found in theirs.items()},
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


def _mixed(ids: list[Ids]) -> list[Ids]:
    chosen = np.random.default_rng(0).choice(len(ids), _MIXED, replace=False)
    return [ids[at] for at in chosen]


def _describe(lengths: list[int]) -> str:
    ordered = sorted(lengths)
    shares = {f"p{share}": ordered[len(ordered) * share // 100] for share in (10, 50, 90, 99)}
    return f"{len(lengths)} texts, mean {statistics.mean(lengths):.1f} tokens, {json.dumps(shares)}"


if __name__ == "__main__":
    main()
