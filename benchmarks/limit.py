"""The limit: the same ONNX Runtime session with no server around it.

Tokens are ready, texts are sorted by length, batches are cut by a token budget, and every way of
dividing the cores between batches and threads is tried. The best of the sweep is the limit.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from embedding_server.core import Ids
from embedding_server.runtime.session import Session

BUDGETS = (256, 512, 1024, 2048)


class Limit(msgspec.Struct, frozen=True):
    """One point of the sweep."""

    budget: int
    slots: int
    """Batches at once; one at once has all cores."""
    tokens_per_second: float


def sweep(session: Session, texts: Sequence[Ids], cores: int) -> list[Limit]:
    """Every budget, with one batch per core at once and with one batch on all cores."""
    return [
        measure(session, texts, budget, slots) for slots in sorted({1, cores}) for budget in BUDGETS
    ]


def batches(texts: Sequence[Ids], budget: int) -> Iterator[list[Ids]]:
    """Texts in order of length, in batches of at most `budget` tokens."""
    batch: list[Ids] = []
    size = 0
    for ids in sorted(texts, key=len):
        if batch and size + len(ids) > budget:
            yield batch
            batch, size = [], 0
        batch.append(ids)
        size += len(ids)
    if batch:
        yield batch


def measure(session: Session, texts: Sequence[Ids], budget: int, slots: int) -> Limit:
    """One pass over the texts."""
    plan = list(batches(texts, budget))[::-1]  # the longest first: no slot ends much later
    with ThreadPoolExecutor(slots) as pool:
        started = time.perf_counter()
        for _ in pool.map(lambda batch: session.run(batch, wide=slots == 1), plan):
            pass
        seconds = time.perf_counter() - started
    return Limit(budget, slots, sum(map(len, texts)) / seconds)


def speed(limit: Limit) -> float:
    """What a point is judged by."""
    return limit.tokens_per_second


def again(session: Session, texts: Sequence[Ids], points: Sequence[Limit]) -> float:
    """Tokens per second of the better of the sweep's two best points, measured now."""
    best = sorted(points, key=speed)[-2:]
    return max(speed(measure(session, texts, one.budget, one.slots)) for one in best)
