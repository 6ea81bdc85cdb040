"""The same server set up otherwise: three models at once, 8 bits, reproducible."""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.graphs import relative_speed
from benchmarks.invariance import largest_difference
from benchmarks.load import bodies, drive
from benchmarks.loads import ROUNDS, Load, tokens_per_second
from benchmarks.server import demo_server
from embedding_server.convert import convert
from embedding_server.core import Ids, ModelSpec, Precision, normalized
from embedding_server.runtime.session import OnnxSession, Session
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.source import int8_graphs

_SECONDS = 4.0
_SHARES = (0.0, 1 / 24, 1 / 12, 1 / 8, 1 / 4)
_COPIES = ("one", "two", "three")


class Trade(msgspec.Struct, frozen=True):
    """What 8 bits give and take, with a share of the linear layers left in fp32."""

    fp32_share: float
    speed: float
    """Times as fast as fp32."""
    least_cosine: float
    neighbours: float
    """Largest difference that a text's neighbours make to its vector of length 1."""


def three_models(spec: ModelSpec, texts: Sequence[str]) -> float:
    """Tokens per second of three models busy at once, of those of one, single texts."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in _COPIES:
            Path(scratch, name).symlink_to(spec.directory)
        names = ",".join(_COPIES)
        with demo_server("--model-path", scratch, "--allowed-embedding-models", names) as server:
            one = _load(server.url, bodies("one", texts, 1))
            each = [bodies(name, texts, 1) for name in _COPIES]
            mixed = [each[at % len(each)][at] for at in range(len(texts))]
            all_three = _load(server.url, mixed)
            return _compare(server.url, all_three, server.url, one)


def against_default(spec: ModelSpec, texts: Sequence[str], *flags: str) -> float:
    """Tokens per second with these flags, of those without, 32 single texts in flight."""
    requests = bodies(spec.id, texts, 1)
    with demo_server() as plain, demo_server(*flags) as other:
        return _compare(
            other.url, _load(other.url, requests), plain.url, _load(plain.url, requests)
        )


def trades(
    spec: ModelSpec, session: Session, texts: Sequence[Ids], goldens: Sequence[Ids]
) -> list[Trade]:
    """The frontier of 8 bits, judged on `goldens`, which nothing is calibrated with."""
    exact = normalized(np.concatenate([session.run([ids]) for ids in goldens]))
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    found = []
    for share in _SHARES:
        with tempfile.TemporaryDirectory() as scratch:
            int8 = int8_graphs(tokenizer, share)
            graph = convert(spec, Path(scratch), int8=int8)
            small = OnnxSession(graph, 1, precision=Precision.INT8)
            alone = normalized(np.concatenate([small.run([ids]) for ids in goldens]))
            difference = largest_difference(small, goldens, rounds=3)
            cosine = float(np.vecdot(alone, exact).min())
            found.append(Trade(share, relative_speed(small, session, texts), cosine, difference))
    return found


def _load(url: str, requests: Sequence[str]) -> Load:
    return partial(drive, f"{url}/api/embed", requests, 32)


def _compare(url: str, load: Load, other_url: str, other: Load) -> float:
    """Median over rounds of one load's speed by the other's."""
    ratios = []
    for _ in range(ROUNDS):
        speed = tokens_per_second(url, load, _SECONDS)
        ratios.append(speed / tokens_per_second(other_url, other, _SECONDS))
    return statistics.median(ratios)
