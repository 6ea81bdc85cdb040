"""CUDA graphs of small batches, as far as a CPU can show: fillers change nothing, and who is alone.

A session on the CPU takes the place of the one that captures; `tests/card` has the real one.
"""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from embedding_server.core import Ids
from embedding_server.runtime import captured
from embedding_server.runtime.calls import Calls
from embedding_server.runtime.captured import SIZES, TEXTS, Captured, capture, filled, fits
from embedding_server.runtime.errors import DeviceLostError
from embedding_server.runtime.layout import Packed, Value
from embedding_server.serving.model import Model
from embedding_server.serving.threads import release
from tests.convert.lowering import lowered
from tests.convert.test_families import GOLDENS, Golden, inputs
from tests.fakes import FakeSession

_LONGEST = 64


class Opened:
    """Two sessions of a golden's graph for CUDA, on the CPU, and their layout."""

    def __init__(self, file: Path, directory: Path) -> None:
        golden = Golden(file)
        path = lowered(golden.convert(directory, target="cuda"), directory / "lowered.onnx")
        self.plain, self.own = (
            ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for _ in range(2)
        )
        declared = self.plain.get_inputs()
        self.layout = Packed([Value(one.name, one.type, one.shape) for one in declared])
        self.items = inputs(golden.kind)

    def capture(
        self, open_session: Callable[[], ort.InferenceSession] | None = None
    ) -> Captured | None:
        """Graphs of up to `_LONGEST` tokens."""
        return capture(
            open_session or (lambda: self.own),
            self.plain,
            self.layout,
            where=("cpu", 0),
            max_tokens=_LONGEST,
            calls=Calls(),
            graph=Path("graph"),
        )

    def rows(self, texts: list[Ids]) -> np.ndarray:
        """What they give without fillers."""
        (value,) = self.plain.run([Packed.output], self.layout.feeds(texts))
        return np.asarray(value)


@pytest.fixture
def any_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs serve however fast they are."""
    monkeypatch.setattr(captured, "_GAIN", 0.0)


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
@pytest.mark.usefixtures("any_gain")
def test_fillers_change_nothing(file: Path, tmp_path: Path) -> None:
    """Rows of one text, of some, and of as many as fit are those of a plain run."""
    opened = Opened(file, tmp_path)
    graphs = opened.capture()
    assert graphs
    assert graphs.sizes == [16, 32, 64]
    short = sorted(opened.items, key=len)
    for texts in ([short[0]], [short[-1]], short[:3], [short[1]] * (TEXTS - 1)):
        found = graphs.run(texts)
        if found is None:
            assert not fits(texts, _LONGEST)
        else:
            assert np.abs(found - opened.rows(texts)).max() <= 1e-5
    assert graphs.run([short[0]] * TEXTS) is None


@given(st.lists(st.integers(1, 40), min_size=1, max_size=TEXTS + 1), st.sampled_from(SIZES))
def test_filled(lengths: list[int], tokens: int) -> None:
    """What fits is filled up to the size, with texts of a token at least, none too long."""
    texts = [np.full(length, 7) for length in lengths]
    full = len(texts) >= TEXTS or sum(lengths) + TEXTS - len(texts) > tokens
    assert fits(texts, tokens) is not full
    if full:
        return
    batch = filled(texts, tokens)
    assert (len(batch), sum(map(len, batch))) == (TEXTS, tokens)
    assert [text is one for text, one in zip(texts, batch, strict=False)] == [True] * len(texts)
    assert min(map(len, batch)) >= 1
    assert max(map(len, batch)) <= tokens


def test_slower_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not clearly faster there are none."""
    opened = Opened(GOLDENS[0], tmp_path)
    monkeypatch.setattr(captured, "_GAIN", 1e9)
    assert opened.capture() is None


@pytest.mark.usefixtures("any_gain")
def test_wrong_graphs(tmp_path: Path) -> None:
    """Nor where they give anything else than plain runs."""
    opened, other = (
        Opened(file, tmp_path / file.stem) for file in GOLDENS if file.stem in ("bert", "electra")
    )
    with capture_logs() as logs:
        assert opened.capture(lambda: other.own) is None
    assert [one["event"] for one in logs] == ["graphs.differ"] * 3 + ["graphs.chosen"]


def test_what_fails(tmp_path: Path) -> None:
    """A capture that fails is no harm, unless the GPU is lost."""
    opened = Opened(GOLDENS[0], tmp_path)

    def fails(code: int) -> ort.InferenceSession:
        raise RuntimeError(f"CUDA failure {code}: a message")

    assert opened.capture(lambda: fails(900)) is None
    with pytest.raises(DeviceLostError):
        opened.capture(lambda: fails(700))


@pytest.mark.usefixtures("any_gain")
def test_an_error_keeps_nothing_alive(tmp_path: Path) -> None:
    """After a replay that failed the graphs go with whoever had them, not when Python cleans up."""
    opened, before = Opened(GOLDENS[0], tmp_path), set(threading.enumerate())
    graphs = opened.capture()
    assert graphs
    for graph in graphs._graphs.values():
        graph._inputs["input_ids"] = None
    alive, threads = weakref.ref(graphs), set(threading.enumerate()) - before
    gc.disable()
    try:
        message = ""
        try:
            graphs.run([opened.items[0][:3]])
        except AttributeError as exc:
            message = str(exc)
        assert "update_inplace" in message
        del graphs, graph
        for _ in range(100):  # the thread may not have let go of the error yet
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()
    assert len(threads) == 1
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.usefixtures("any_gain")
def test_a_size_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it serve, and what it would have taken runs plainly."""
    graph = captured._Graph

    def up_to_16(session: ort.InferenceSession, number: int, *rest: Any) -> Any:
        if number > 16:
            raise RuntimeError("no more")
        return graph(session, number, *rest)

    monkeypatch.setattr(captured, "_Graph", up_to_16)
    opened = Opened(GOLDENS[0], tmp_path)
    graphs = opened.capture()
    assert graphs
    assert graphs.sizes == [16]
    assert graphs.run([np.ones(20, np.int64)]) is None


def test_freeing_waits() -> None:
    """A model is let go of once nobody captures."""
    calls, models = Calls(), [cast("Model", FakeSession())]
    thread = threading.Thread(target=release, args=(models, calls.shared))
    with calls.alone():
        thread.start()
        thread.join(0.05)
        assert models
    thread.join(10)
    assert not models


def test_alone() -> None:
    """Whoever waits to be alone goes before those who come after it, and beside nobody."""
    calls, inside, end = Calls(), threading.Event(), threading.Event()
    entered = threading.Event()

    def alone() -> None:
        with calls.alone():
            inside.set()
            end.wait(10)

    def later() -> None:
        with calls.shared():
            entered.set()

    threads = [threading.Thread(target=one) for one in (alone, later)]
    with calls.shared():
        threads[0].start()
        for _ in range(5000):
            if repr(calls) == "Calls(running=1, waiting=1)":
                break
            time.sleep(0.001)
        threads[1].start()
        assert not entered.wait(0.05)
        assert not inside.is_set()
    assert inside.wait(10)
    assert not entered.wait(0.05)
    end.set()
    for thread in threads:
        thread.join(10)
    assert entered.is_set()
    assert repr(calls) == "Calls(running=0, waiting=0)"
