"""The planner's ceiling: the very schedule of the server, driven by a server that costs nothing.

Runs take what the measured cost says, slots never wait for Python, and every text that is done is
replaced by the next one at once. What is lost against the limit is lost by the schedule alone.
"""

import heapq
import itertools
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.limit import batches
from embedding_server.core import Ids
from embedding_server.serving.cost import Cost, Shape
from embedding_server.serving.schedule import Entry, Lane, Schedule


class Model:
    """A model as the schedule knows it."""

    threads, batch_tokens = 1, 256

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def allowed(self, tokens: int) -> int:
        """There is memory enough."""
        return tokens

    def room(self, tokens: int) -> int:
        """The same."""
        return tokens


def ceiling(texts: Sequence[Ids], cost: Cost, in_flight: int, slots: int, budget: int) -> float:
    """Tokens per second with so many single texts in flight, one pass over `texts`."""
    schedule: Schedule[Model] = Schedule(budget)
    model, source = Model(cost), iter(texts)
    running: list[tuple[float, int, list[Entry]]] = []
    numbers = itertools.count()
    now = 0.0

    def arrive(count: int) -> None:
        for ids in itertools.islice(source, count):
            schedule.add(model, Lane.INTERACTIVE, "", None, [ids])
        while len(running) < slots and (taken := schedule.take(slots - len(running))):
            batch = taken[1]
            heapq.heappush(running, (now + _seconds(cost, batch), next(numbers), batch))

    arrive(in_flight)
    while running:
        now, _, done = heapq.heappop(running)
        arrive(len(done))
    return sum(map(len, texts)) / now


def modelled_limit(texts: Sequence[Ids], cost: Cost, slots: int, budget: int) -> float:
    """Tokens per second of texts sorted by length, by the same cost."""
    plans = [[len(ids) for ids in batch] for batch in batches(texts, budget)]
    return sum(map(len, texts)) * slots / sum(cost.seconds(Shape.of(one)) for one in plans)


def planning_seconds(pending: int, *, padded: bool) -> float:
    """Mean time to plan one batch while so many texts of 4 to 512 tokens are pending."""
    schedule: Schedule[Model] = Schedule(512)
    lengths = np.clip(np.random.default_rng(0).lognormal(3.3, 0.9, pending), 4, 512).astype(int)
    model, texts = Model(Cost(padded=padded)), [np.zeros(length, np.int64) for length in lengths]
    schedule.add(model, Lane.BULK, "", None, texts)
    rounds = 200
    started = time.perf_counter()
    for _ in range(rounds):
        taken = schedule.take(1)
        assert taken
        schedule.add(model, Lane.BULK, "", None, [entry.item for entry in taken[1]])
    return (time.perf_counter() - started) / rounds


def _seconds(cost: Cost, batch: Sequence[Entry]) -> float:
    return cost.seconds(Shape.of(entry.length for entry in batch))
