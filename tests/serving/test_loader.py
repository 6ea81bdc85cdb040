"""Loading: the self-check, and a cache that is damaged."""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.core import Ids, ModelSpec, Precision, Rows
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.session import Stop, Threads
from embedding_server.serving.check import CheckError, check
from embedding_server.serving.cost import Cost
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.profile import store, stored
from embedding_server.serving.source import Source
from embedding_server.serving.tuning import Way
from tests.conftest import Serve
from tests.fakes import FakeSession, ids

Bend = Callable[[Rows], Rows]


@pytest.fixture
def spec(models: Path) -> ModelSpec:
    """The tiny model."""
    return read_directory(models / "tiny", "tiny")


class Session(FakeSession):
    """A session whose rows the test bends."""

    def __init__(self, bend: Bend, width: int) -> None:
        super().__init__(width=width)
        self._bend = bend

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        return self._bend(super().run(texts, wide=wide))


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda rows: rows[:, :-1], "width"),
        (lambda rows: rows * 0, "zeros"),
        (lambda rows: rows * np.nan, "not finite"),
        (lambda rows: rows * (np.nan if len(rows) == 1 else 1), "not finite"),
        (lambda rows: rows + len(rows), "with its neighbours"),
    ],
)
def test_self_check(spec: ModelSpec, bend: Bend, said: str) -> None:
    """Rows of another width, not finite, zero, or changed by their neighbours are refused."""
    items = [ids(9), ids(3, 5)]
    with pytest.raises(CheckError, match=said):
        check(spec, items, Session(bend, spec.dimensions))
    check(spec, items, Session(lambda rows: rows, spec.dimensions))


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx_data"])
async def test_damaged_cache_is_made_anew(serve: Serve, tmp_path: Path, file: str) -> None:
    """A graph in the cache that cannot be opened is dropped and converted again."""
    async with serve(cache_dir=tmp_path):
        pass
    for graph in tmp_path.glob(f"graphs/*/{file}"):
        graph.write_bytes(graph.read_bytes()[:1000])
    async with serve(cache_dir=tmp_path, preload=()) as client:
        body = {"model": "tiny", "text": "a"}
        assert (await client.post("/api/embed", json=body)).status_code == 503
    async with serve(cache_dir=tmp_path, preload=()) as client:
        assert (await client.post("/api/embed", json=body)).status_code == 200


def test_profile_is_measured_once(spec: ModelSpec, tmp_path: Path) -> None:
    """The first load measures and stores, the next one reads; other threads are measured anew."""
    plan = RunPlan(cache=tmp_path, warmup=0.05)
    source = Source(spec, plan, 2)
    profile = source.profile()
    assert stored(source.profile_path) == profile
    changed = msgspec.structs.replace(profile, cost=Cost(run=1.0))
    store(changed, source.profile_path)
    assert source.profile() == changed
    longer = Source(spec, msgspec.structs.replace(plan, warmup=0.06), 2)
    assert longer.profile_path == source.profile_path
    assert longer.profile().cost != changed.cost
    fixed = Source(spec, msgspec.structs.replace(plan, threads_per_run=2), 2)
    assert fixed.profile().way.threads == Threads(2)


def test_no_more_threads_than_cores(spec: ModelSpec, tmp_path: Path) -> None:
    """A run never takes more threads than there are, or it would wait for them for ever."""
    source = Source(spec, RunPlan(cache=tmp_path, threads_per_run=64), 2)
    assert source.profile().way.threads == Threads(2)


def test_measured_beside_traffic_is_not_kept(spec: ModelSpec, tmp_path: Path) -> None:
    """Where the machine was in use, what was measured serves once."""
    source = Source(spec, RunPlan(cache=tmp_path, warmup=0.05), 1)
    asked = itertools.count()
    assert source.profile(lambda: next(asked) < 2).cost.token > 0
    assert stored(source.profile_path) is None


def test_nothing_is_measured_beside_traffic(spec: ModelSpec, tmp_path: Path) -> None:
    """Where others use the machine, a model loads without taking it from them."""
    source = Source(spec, RunPlan(cache=tmp_path, warmup=5.0), 1)
    started = time.monotonic()
    profile = source.profile(lambda: False)
    assert time.monotonic() - started < 2.5
    assert (profile.cost, profile.way) == (Cost(), Way())
    assert stored(source.profile_path) is None


def test_reduced_precision_is_judged(spec: ModelSpec, tmp_path: Path) -> None:
    """An 8-bit model has another fingerprint, and figures of its quality in its profile."""
    exact = Source(spec, RunPlan(cache=tmp_path, warmup=0.05), 1)
    source = Source(spec, RunPlan(cache=tmp_path, warmup=0.05, precision=Precision.INT8), 1)
    quality = source.profile().quality
    assert exact.profile().quality is None
    assert quality
    assert 0.9 < quality.cosine <= 1.0
    assert quality.speed > 0
    assert source.fingerprint("cpu") != exact.fingerprint("cpu")


def test_precision_of_one_model(spec: ModelSpec, tmp_path: Path) -> None:
    """A model's own precision goes before the server's, and is compared with fp32 none the less."""
    own = msgspec.structs.replace(spec, precision=Precision.INT8)
    source, plain = (Source(one, RunPlan(cache=tmp_path), 1) for one in (own, spec))
    assert source.precision is source.open(Threads()).precision is Precision.INT8
    texts = [np.arange(4, 12)]
    sessions = (plain.open(Threads()), source.exact(), source.open(Threads()))
    expected, exact, reduced = (np.stack(list(session.run(texts))) for session in sessions)
    assert np.array_equal(exact, expected)
    assert not np.array_equal(reduced, expected)


def test_stopped_run(spec: ModelSpec, tmp_path: Path) -> None:
    """A run that is told to stop fails, and the session serves on."""
    session = Source(spec, RunPlan(cache=tmp_path), 1).open(Threads())
    stop = Stop()
    stop()
    with pytest.raises(SessionError):
        session.run([np.ones(5, np.int64)], stop=stop)
    assert np.shape(session.run([np.ones(5, np.int64)])) == (1, spec.dimensions)


def test_lean_run(spec: ModelSpec, tmp_path: Path) -> None:
    """A run that gives memory back afterwards gives the same vectors."""
    session = Source(spec, RunPlan(cache=tmp_path), 1).open(Threads())
    texts = [np.ones(5, np.int64)] * 3
    assert np.array_equal(session.run(texts, stop=Stop(lean=True)), session.run(texts))
