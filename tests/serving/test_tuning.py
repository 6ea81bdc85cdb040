"""How many threads a run gets."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server.core import Ids, Rows
from embedding_server.runtime.session import Spinning, Stop, Threads
from embedding_server.serving import tuning as module
from embedding_server.serving.tuning import (
    Point,
    Way,
    all_ways,
    batch,
    best_way,
    frontier,
    measure,
    sweep,
    ways,
)
from tests.fakes import FakeSession

ONE, TWO, FOUR = (Threads(count) for count in (1, 2, 4))


@given(st.integers(1, 3000), st.integers(1, 512))
def test_batches_have_the_size_asked_for(tokens: int, limit: int) -> None:
    """A batch has exactly so many tokens, and no text over the model's limit."""
    texts = batch(FakeSession(), tokens, limit)
    assert sum(map(len, texts)) == tokens
    assert max(map(len, texts)) <= limit


def test_what_is_tried() -> None:
    """Cores are divided evenly, the default comes first, what is fixed leaves sizes to try."""
    assert ways(1, None) == [Way(ONE, 256), Way(ONE, 512), Way(ONE, 1024)]
    quiet = Threads(4, Spinning.NEVER)
    assert [way.threads for way in ways(4, None)] == [ONE, ONE, ONE, TWO, FOUR, quiet]
    assert all_ways(4, None)[0] == ways(4, None)[0] == Way()
    assert {way.threads for way in ways(4, TWO)} == {TWO}
    spinning = {way.threads.spinning for way in all_ways(4, None)}
    assert spinning == set(Spinning)


def test_frontier() -> None:
    """What is slower and takes longer than something else is left out."""
    quick, good, bad = Point(Way(), 10.0, 1.0), Point(Way(), 20.0, 2.0), Point(Way(), 15.0, 2.5)
    assert frontier([bad, good, quick]) == [quick, good]


class Clock:
    """Stands in for `time`; it moves when sessions run."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        """Seconds."""
        return cls.now

    perf_counter = monotonic


class Paced(FakeSession):
    """A session whose speed depends on its threads, on a clock of its own."""

    def __init__(self, threads: Threads, speeds: Iterator[float]) -> None:
        super().__init__()
        self.threads = threads
        self.speed = next(speeds)

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        Clock.now += sum(map(len, texts)) / self.speed
        return super().run(texts)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ([100.0, 105.0], ONE),
        ([100.0, 150.0, 150.0, 100.0], TWO),
        ([100.0, 150.0, 100.0, 100.0], ONE),
    ],
    ids=["noise", "clear", "not so the second time"],
)
def test_default_is_left_for_a_clear_gain(
    monkeypatch: pytest.MonkeyPatch, speeds: list[float], expected: Threads
) -> None:
    """Another way serves where it is clearly faster, measured twice."""
    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(module, "beside_load", lambda *_: nullcontext())
    order = iter(speeds)
    candidates = [Way(ONE), Way(TWO)]
    chosen = best_way(lambda threads: Paced(threads, order), candidates, 2, 256, seconds=1000.0)
    assert chosen.threads == expected


def test_nothing_is_tried_out_of_time() -> None:
    """Where the time is over after the default, nothing else is opened."""
    opened: list[Threads] = []

    def open_session(threads: Threads) -> FakeSession:
        opened.append(threads)
        return FakeSession()

    assert best_way(open_session, ways(4, None), 4, 256, seconds=0.0) == Way()
    assert opened == [ONE]


def test_real_measurement() -> None:
    """All cores are busy, and the point says what was measured."""
    session = FakeSession()
    point = measure(session, Way(ONE, 100), 2, 256, 0.01)
    assert point.way == Way(ONE, 100)
    assert point.tokens_per_second > 0
    assert point.run_seconds > 0
    assert len(session.batches) >= 3


def test_sweep_gives_every_point() -> None:
    """Everything is tried; sessions are opened once for all sizes of batch."""
    opened: list[Threads] = []

    def open_session(threads: Threads) -> FakeSession:
        opened.append(threads)
        return FakeSession()

    points = list(sweep(open_session, all_ways(2, None), 2, 256, 0.0))
    assert [point.way for point in points] == all_ways(2, None)
    assert len(opened) == len(set(opened)) == 4
