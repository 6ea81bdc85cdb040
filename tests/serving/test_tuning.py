"""How many threads a run gets."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server.core import Ids, Rows
from embedding_server.runtime.session import Spinning, Stop, Threads
from embedding_server.serving import tuning as module
from embedding_server.serving.tuning import (
    Point,
    batch,
    best_threads,
    candidates,
    choose,
    frontier,
    measure,
    steps,
    sweep,
)
from tests.fakes import FakeSession

ONE, TWO, FOUR = (Threads(count) for count in (1, 2, 4))


@given(st.integers(1, 3000), st.integers(1, 512))
def test_batches_have_the_size_asked_for(tokens: int, limit: int) -> None:
    """A batch has exactly so many tokens, and no text over the model's limit."""
    texts = batch(tokens, limit)
    assert sum(map(len, texts)) == tokens
    assert max(map(len, texts)) <= limit


def test_candidates() -> None:
    """Cores are divided evenly, the default comes first, one core leaves no choice."""
    assert candidates(1) == [ONE]
    assert candidates(4)[:3] == [ONE, TWO, FOUR]
    assert candidates(4)[3:] == [Threads(4, Spinning.NEVER), Threads(4, Spinning.ALWAYS)]


def test_default_is_left_for_a_clear_gain_only() -> None:
    """A tenth more is noise, a fifth more is not."""
    assert choose({ONE: 100.0, TWO: 109.0}) == ONE
    assert choose({ONE: 100.0, TWO: 120.0, FOUR: 90.0}) == TWO


def test_frontier() -> None:
    """What is slower and takes longer than something else is left out."""
    quick, good, bad = Point(ONE, 1, 10.0, 1.0), Point(ONE, 1, 20.0, 2.0), Point(TWO, 1, 15.0, 2.5)
    assert frontier([bad, good, quick]) == [quick, good]


class Paced(FakeSession):
    """A session whose speed depends on its threads, on a clock of its own."""

    def __init__(self, threads: Threads, speeds: dict[Threads, float]) -> None:
        super().__init__()
        self.threads = threads
        self.speed = speeds[threads]

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        Clock.now += sum(map(len, texts)) / self.speed
        return super().run(texts)


class Clock:
    """Stands in for `time`; it moves when sessions run."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        """Seconds."""
        return cls.now

    perf_counter = monotonic


@pytest.mark.parametrize(("fast", "expected"), [(1.05, ONE), (1.5, TWO)])
def test_best_threads(monkeypatch: pytest.MonkeyPatch, fast: float, expected: Threads) -> None:
    """The session with other threads serves where it is clearly faster."""
    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(module, "_event_loop", nullcontext)
    speeds = dict.fromkeys(candidates(2), 500.0) | {ONE: 1000.0, TWO: 1000.0 * fast}

    def open_session(threads: Threads) -> Paced:
        return Paced(threads, speeds)

    chosen = best_threads(open_session(ONE), open_session, 2, 256, 100.0)  # type: ignore[arg-type]
    assert chosen.threads == expected


def test_nothing_is_tried_out_of_time() -> None:
    """Where the time is over after the default, nothing else is opened."""
    opened: Any = FakeSession()

    def refuse(_: Threads) -> Any:
        raise AssertionError

    assert best_threads(opened, refuse, 4, 256, 0.0) is opened


def test_real_measurement() -> None:
    """All slots run, and the point says what was measured."""
    session = FakeSession()
    point = measure(session, 2, batch(100, 256), 0.01)
    assert (point.threads, point.batch_tokens) == (session.threads, 100)
    assert point.tokens_per_second > 0
    assert point.run_seconds > 0
    assert len(session.batches) >= 3


def test_sweep_gives_every_point() -> None:
    """Every division of the cores is tried with every size of batch."""

    def open_session(threads: Threads) -> FakeSession:
        session = FakeSession()
        session.threads = threads
        return session

    points = list(sweep(open_session, 2, 256, 0.0))  # type: ignore[arg-type]
    assert len(points) == steps(2) == len({(one.threads, one.batch_tokens) for one in points})
    assert {one.threads.spinning for one in points} == set(Spinning)
