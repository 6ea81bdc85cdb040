"""`make soak` sees what is wrong; that a server does nothing wrong only the soak itself shows."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from benchmarks.soak.asks import KINDS, Draw
from benchmarks.soak.clients import Judge
from benchmarks.soak.known import TOLERANCE, Known, ranking_off, rows_off, words_off
from benchmarks.soak.models import DEMO, MULTI, SPARSE
from benchmarks.soak.readings import GROWTH_MIB, POOL_THREADS, Reading, leaks

KNOWN = np.array([0.1, 0.9, 0.5], np.float32)
RIGHT = [(1, 0.9), (2, 0.5), (0, 0.1)]


@pytest.mark.parametrize(
    ("ranked", "top"),
    [
        (RIGHT[:2], 3),
        (RIGHT, 2),
        ([RIGHT[0], RIGHT[0]], 2),
        ([RIGHT[1], RIGHT[0], RIGHT[2]], 3),
        ([RIGHT[1], RIGHT[2]], 2),
        ([(1, 0.9), (2, 0.6), (0, 0.1)], 3),
        ([(1, 0.9), (3, 0.5), (0, 0.1)], 3),
    ],
)
def test_wrong_rankings(ranked: list[tuple[int, float]], top: int) -> None:
    """Too few or many, one twice, out of order, the best left out, another score or place."""
    assert ranking_off(ranked, KNOWN, top) > 0.01


def test_right_rankings() -> None:
    """All of them, the best of them, and none of none."""
    assert ranking_off(RIGHT, KNOWN, 5) < 1e-6
    assert ranking_off(RIGHT[:1], KNOWN, 1) < 1e-6
    assert ranking_off([], KNOWN[:0], 0) == 0


def test_wrong_vectors() -> None:
    """Rows in another order, too few, ragged, or not finite; words too many or too few."""
    rows = np.eye(3, dtype=np.float32)
    assert rows_off(rows.tolist(), rows) == 0
    assert rows_off(rows[::-1], rows) == 1
    assert rows_off(rows[:2], rows) == math.inf
    assert rows_off([[1.0], [1.0, 2.0]], rows) == math.inf
    assert not rows_off(np.full((3, 3), np.nan), rows) <= TOLERANCE
    assert words_off({1: 0.5}, {1: 0.5}) == 0
    assert words_off({1: 0.5, 2: 0.25}, {1: 0.5}) == words_off({1: 0.5}, {1: 0.5, 2: 0.25}) == 0.25


@pytest.mark.parametrize(("name", "model"), [("openai", DEMO), ("native, tokens", MULTI)])
def test_neighbours_are_not_mistaken(name: str, model: str) -> None:
    """An answer to another request of the same kind is wrong, and counted so."""
    rows = np.random.default_rng(0).normal(size=(70, 2, 3)).astype(np.float32)
    known = Known(
        texts=[str(at) for at in range(70)],
        dense={DEMO: rows[:, 0]},
        multi=list(rows),
        sparse=[],
        scores={},
    )
    ask = KINDS[name].make(draw(known, model))
    places = [int(one) for one in ask.body["input"]]

    def answer(places: list[int]) -> httpx.Response:
        if name == "openai":
            data = [{"index": at, "embedding": rows[one, 0].tolist()}
                    for at, one in enumerate(places)]  # fmt: skip
            return httpx.Response(200, content=msgspec.json.encode({"data": data}))
        found = [rows[one].tolist() for one in places]
        return httpx.Response(200, content=msgspec.json.encode({"embeddings": found}))

    judge = Judge()
    judge.vector(name, ask, answer(places))
    assert not judge.failures
    judge.vector(name, ask, answer([(one + 1) % 70 for one in places]))
    assert judge.counts == {(name, "right"): 1, (name, "wrong"): 1}
    assert judge.failed == 1


def test_dishonest_refusals() -> None:
    """A refusal says when to come back, and no sound model is one that cannot be loaded."""
    known = Known(texts=["a"] * 70, dense={}, multi=[], sparse=[{}] * 70, scores={})
    ask = KINDS["native, sparse"].make(draw(known, SPARSE))
    refused = partial(httpx.Response, 503, headers={"retry-after": "1", "retry-after-ms": "900"})
    judge = Judge()
    assert judge.refusal("any", ask, refused(text="busy")) == 0.9
    assert judge.failed == 0
    judge.refusal("any", ask, refused(text="it could not be loaded"))
    assert judge.failed == 1
    judge.broken.add(SPARSE)
    judge.refusal("any", ask, refused(text="it could not be loaded"))
    assert judge.failed == 1
    assert judge.refusal("any", ask, httpx.Response(503, text="busy")) is None
    assert judge.failed == 2


def draw(known: Known, model: str) -> Draw:
    """The same every time."""
    return Draw(known, random.Random(0), model)  # noqa: S311 - seeded, no secret


def reading(anonymous: float = 100.0, **changes: Any) -> Reading:
    """A quiet moment."""
    held = dict.fromkeys(Reading.__struct_fields__, 0) | {"anonymous": anonymous}
    return msgspec.convert(held | changes, Reading)


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (reading(), None),
        (reading(100 + GROWTH_MIB), None),
        (reading(101 + GROWTH_MIB), "memory grew"),
        (reading(descriptors=1), "descriptors: 0 at first, 1"),
        (reading(threads=POOL_THREADS), None),
        (reading(threads=POOL_THREADS + 1), "threads"),
        (reading(tasks=2), "tasks"),
    ],
)
def test_leaks(last: Reading, found: str | None) -> None:
    """What differs between the first quiet moment and the last is told."""
    told = leaks([reading(), reading(), reading(), last])
    assert len(told) == bool(found)
    assert not found or found in told[0]


@pytest.mark.parametrize(
    ("memory", "rises"),
    [
        (lambda at: 100 + GROWTH_MIB / 19 * at, True),
        (lambda at: 100 + GROWTH_MIB * (at % 2), False),
        (lambda at: 100 + GROWTH_MIB / 40 * at, False),
    ],
)
def test_slow_rise(memory: Callable[[int], float], rises: bool) -> None:  # noqa: FBT001
    """Memory that rises every time is a leak, though it may move about by as much."""
    told = leaks([reading(memory(at)) for at in range(20)])
    assert any("rises" in one for one in told) == rises
