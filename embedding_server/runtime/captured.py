"""Small batches on a GPU as CUDA graphs, of a few sizes, captured when their model is loaded.

A few texts keep a GPU busy for less time than the host takes to launch their kernels one by one. A
CUDA graph is one launch, but of the sizes and addresses that it was captured with: so a batch is
filled up to the next size with texts whose rows are dropped, and its inputs and rows have places of
their own on the GPU.

ONNX Runtime captures a graph per thread and `gpu_graph_id`, and wants no other run of the session
beside it ("Using CUDA Graphs" in its documentation of the CUDA provider): so the session is for
this alone, and has one thread.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from embedding_server.core import Ids
from embedding_server.runtime.calls import Calls
from embedding_server.runtime.errors import DeviceLostError, SessionError, translated
from embedding_server.runtime.layout import Packed
from embedding_server.runtime.packed import ON_HOST

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Where = tuple[str, int]
"""A kind of device, as ONNX Runtime's `OrtValue` calls it, and a number."""

TEXTS, SIZES = 8, (16, 32, 64, 128, 256)
"""Texts and tokens of a graph; one of the texts at least is a filler."""
MOST_WEIGHTS = 512 << 20
"""Bytes: its session has weights of its own."""
_FEW, _MANY = [np.arange(1, 5)], [np.arange(1, 2 + index) for index in range(4)]
"""A batch to capture with, and another one to see what it gives."""
_RUNS, _GAIN = 20, 1.1
_OFF = 1e-2
"""How far rows may be from a plain run's of the same batch, of the largest number in them."""

log = structlog.get_logger()


def capture(
    open_session: Callable[[], ort.InferenceSession],
    plain: ort.InferenceSession,
    layout: Packed,
    *,
    where: Where,
    max_tokens: int,
    calls: Calls,
    graph: Path,
) -> "Captured | None":
    """The CUDA graphs that are right and clearly faster; None where there are none.

    Args:
        open_session: gives one with `enable_cuda_graph`.
        plain: one of the same graph without, to compare with.
        layout: how texts are laid out for both.
        where: on which GPU.
        max_tokens: how long a text may be.
        calls: who else calls CUDA; nobody else may capture.
        graph: its file, for the log.

    Raises:
        DeviceLostError: the GPU will not work again.
    """
    found = None
    try:
        with translated(), calls.shared():
            found = Captured(open_session(), plain, layout, where)
        for tokens in (size for size in SIZES if size <= max_tokens):
            with translated():
                found.capture(tokens, calls)
    except DeviceLostError:
        raise
    except SessionError as exc:  # smaller ones may serve all the same
        log.warning("graphs.not_captured", graph=str(graph), error=str(exc))
    sizes = found.sizes if found else []
    log.info("graphs.chosen", graph=str(graph), tokens=sizes)
    return found if sizes else None


class Captured:
    """The graphs of one session; see `capture`."""

    def __init__(
        self,
        session: ort.InferenceSession,
        plain: ort.InferenceSession,
        layout: Packed,
        where: Where,
    ) -> None:
        self._session, self._plain = session, plain
        self._layout, self._where = layout, where
        self._graphs: dict[int, _Graph] = {}
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        # A daemon, so that a replay that hangs does not keep the process.
        threading.Thread(target=_replays, args=(self._work,), name="graphs", daemon=True).start()

    def __del__(self) -> None:
        """The thread ends."""
        self._work.put(None)

    def __repr__(self) -> str:
        return f"Captured({self.sizes})"

    @property
    def sizes(self) -> list[int]:
        """Tokens of each graph."""
        return list(self._graphs)

    def capture(self, tokens: int, calls: Calls) -> None:
        """Capture a graph of so many tokens, and keep it if it serves."""
        with calls.shared():
            feeds = self._feeds(_FEW, tokens)
            rows = self._run_plainly(feeds)
            graph = _Graph(self._session, tokens, feeds, rows, self._where)
        with calls.alone():
            self._replay(graph, feeds)
        with calls.shared():
            if self._serves(graph, tokens):
                self._graphs[tokens] = graph

    def run(self, texts: Sequence[Ids]) -> Array | None:
        """The graph's output for these texts; None where there is none of their size."""
        size = next((size for size in SIZES if fits(texts, size)), 0)
        if not (graph := self._graphs.get(size)):
            return None
        return self._replay(graph, self._feeds(texts, size))[: len(texts)]

    def _feeds(self, texts: Sequence[Ids], tokens: int) -> Feeds:
        return self._layout.feeds(filled(texts, tokens), tokens)

    def _replay(self, graph: "_Graph", feeds: Feeds) -> Array:
        outcome: Future[Array] = Future()
        self._work.put((partial(graph, feeds), outcome))
        try:
            return outcome.result()
        finally:
            del outcome  # the traceback of its error has this frame, and so our session

    def _run_plainly(self, feeds: Feeds) -> Array:
        (value,) = self._plain.run([self._layout.output], feeds)
        return np.asarray(value)

    def _serves(self, graph: "_Graph", tokens: int) -> bool:
        """Whether it gives what a plain run does, clearly faster than one of its smallest batch."""
        feeds = self._feeds(_MANY, tokens)
        rows, expected = self._replay(graph, feeds), self._run_plainly(feeds)
        if not np.abs(rows - expected).max() <= _OFF * np.abs(expected).max():
            log.warning("graphs.differ", tokens=tokens)
            return False
        smaller = max((size for size in SIZES if size < tokens), default=TEXTS - 1)
        smallest = [np.ones(smaller - TEXTS + 2, np.int64)]
        plain = _seconds(lambda: self._run_plainly(self._layout.feeds(smallest)))
        return plain > _GAIN * _seconds(lambda: self._replay(graph, self._feeds(smallest, tokens)))


_Work = tuple[Callable[[], Array], Future[Array]]


def _replays(work: "SimpleQueue[_Work | None]") -> None:
    """The thread of a session's graphs."""
    while one := work.get():
        run, outcome = one
        try:
            outcome.set_result(run())
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is waited for
            outcome.set_exception(exc)
        del one, run, outcome  # or the last graph would live as long as nothing runs


class _Graph:
    """One graph, with the places of its inputs and rows on the GPU; its first run captures it.

    Args:
        session: whose graph it is.
        number: names it.
        feeds: inputs of its size.
        rows: of the shape that they give.
        where: on which GPU.
    """

    def __init__(
        self, session: ort.InferenceSession, number: int, feeds: Feeds, rows: Array, where: Where
    ) -> None:
        self._session, self._options = session, ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._binding = session.io_binding()
        self._inputs: dict[str, ort.OrtValue] = {}
        for name, value in feeds.items():
            if name in ON_HOST:  # what these are depends on the size alone
                self._binding.bind_cpu_input(name, value)
                continue
            self._inputs[name] = ort.OrtValue.ortvalue_from_numpy(value, *where)
            self._binding.bind_ortvalue_input(name, self._inputs[name])
        dtype = rows.dtype.type
        self._rows = ort.OrtValue.ortvalue_from_shape_and_type(rows.shape, dtype, *where)
        self._binding.bind_ortvalue_output(Packed.output, self._rows)

    def __call__(self, feeds: Feeds) -> Array:
        """Its rows for inputs of its size."""
        for name, place in self._inputs.items():
            place.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return np.asarray(self._rows.numpy())


def fits(texts: Sequence[Ids], tokens: int) -> bool:
    """Whether a graph of so many tokens holds them beside a token at least of every filler."""
    fillers = TEXTS - len(texts)
    return fillers > 0 and sum(map(len, texts)) + fillers <= tokens


def filled(texts: Sequence[Ids], tokens: int) -> list[Ids]:
    """The texts, which must fit, and behind them fillers: `TEXTS` of so many tokens together."""
    fillers = TEXTS - len(texts)
    lengths = [1] * fillers
    lengths[-1] = tokens - sum(map(len, texts)) - (fillers - 1)
    return [*texts, *(np.ones(length, np.int64) for length in lengths)]


def _seconds(run: Callable[[], Array]) -> float:
    """The median of some runs."""
    times = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
