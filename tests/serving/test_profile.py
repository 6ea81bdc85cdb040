"""What a model costs: fitting, measuring, storing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_server.core import Ids, Rows
from embedding_server.runtime.session import Spinning, Stop, Threads
from embedding_server.serving import profile as module
from embedding_server.serving.cost import Cost, Shape
from embedding_server.serving.profile import Profile, Quality, fit, measure, store, stored
from embedding_server.serving.tuning import Way
from tests.fakes import FakeSession

BATCHES = [(8,), (16,) * 16, (64,), (60,) * 7 + (64,), (250, 256), (8,) * 20 + (90,)]


@given(
    st.floats(1e-5, 1e-2),
    st.floats(1e-6, 1e-3),
    st.floats(1e-6, 1e-3),
    st.floats(1e-9, 1e-6),
    st.booleans(),
)
def test_fit_finds_the_cost(
    run: float,
    text: float,
    token: float,
    pair: float,
    padded: bool,  # noqa: FBT001 - generated
) -> None:
    """Times that follow a cost give that cost back."""
    cost = Cost(run, text, token, pair, padded)
    measured = {one: cost.seconds(Shape.of(one)) for one in BATCHES}
    found = fit(measured, padded=padded)
    for one, seconds in measured.items():
        assert found.seconds(Shape.of(one)) == pytest.approx(seconds, rel=1e-3)


@given(st.lists(st.floats(1e-4, 1.0), min_size=len(BATCHES), max_size=len(BATCHES)))
def test_fit_is_never_negative(seconds: list[float]) -> None:
    """Whatever was measured, no part of the cost is negative and some part is positive."""
    cost = fit(dict(zip(BATCHES, seconds, strict=True)), padded=False)
    assert min(cost.run, cost.text, cost.token, cost.pair) >= 0
    assert cost.seconds(Shape.of([8])) > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fit_of_few_batches_is_sane(count: int) -> None:
    """Where time allowed few batches, what was not seen is not blown up by their noise."""
    cost = Cost(1e-3, 1e-4, 1e-2, 1e-6)
    shapes = [Shape.of(one) for one in module._BATCHES]
    noisy = [cost.seconds(shape) * (1.25 if at else 1.0) for at, shape in enumerate(shapes)]
    found = fit(dict(zip(module._BATCHES[:count], noisy, strict=False)), padded=False)
    for shape, seconds in zip(shapes, noisy, strict=True):
        assert seconds / 3 < found.seconds(shape) < seconds * 3


class Clocked(FakeSession):
    """A session that takes as long as a cost says, on a clock of its own."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.now = 0.0
        self._cost = cost

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        self.now += self._cost.seconds(Shape.of(map(len, texts)))
        return super().run(texts, wide=wide)

    def perf_counter(self) -> float:
        """The clock."""
        return self.now

    monotonic = perf_counter


def test_time_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow model is measured no longer than allowed, by at most one run; 0 measures nothing."""
    session = Clocked(Cost(1.0, 0.0, 0.01, 0.0))
    monkeypatch.setattr(module, "time", session)
    measure(session, 256, 3.0, 1)
    assert len(session.batches) <= 3
    before = len(session.batches)
    assert measure(session, 256, 0.0, 1) == Cost()
    assert len(session.batches) == before


def test_measuring_finds_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session really takes comes out, for batches that were not measured."""
    cost = Cost(2e-3, 1e-4, 2e-4, 3e-7)
    session = Clocked(cost)
    monkeypatch.setattr(module, "time", session)
    found, shape = measure(session, 256, 100.0, 1), Shape.of([99, 3])
    assert found.seconds(shape) == pytest.approx(cost.seconds(shape), rel=1e-3)


def test_stored_and_read(tmp_path: Path) -> None:
    """A profile is read as it was stored; a damaged or missing one is none."""
    path = tmp_path / "profiles" / "p.json"
    assert stored(path) is None
    profile = Profile(
        Cost(), Way(Threads(2, Spinning.NEVER), 512), 3.0, Quality(cosine=0.99, speed=1.7)
    )
    store(profile, path)
    assert stored(path) == profile
    path.write_text("{")
    assert stored(path) is None


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A profile that cannot be stored is no failure."""
    (tmp_path / "file").touch()
    store(Profile(Cost(), Way(), 3.0), tmp_path / "file" / "p.json")
    assert stored(tmp_path / "file" / "p.json") is None
