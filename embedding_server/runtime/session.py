"""One graph, ready to run: the only place that knows ONNX Runtime.

Sessions are called from the device's worker threads; they keep no state between calls, so several
threads may share one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from embedding_server.core import Ids, Item, Precision, Vectors
from embedding_server.runtime.calls import Calls
from embedding_server.runtime.captured import MOST_WEIGHTS, Captured, capture
from embedding_server.runtime.errors import FellBackError, SessionError, translated
from embedding_server.runtime.layout import Layout, LayoutError, Packed, Value
from embedding_server.runtime.providers import CPU, CUDA, ON_CPU, Providers, capturing

VERSION: str = ort.__version__
"""ONNX Runtime's version: part of what decides a vector's last bits."""

_ARENA = "cpu:0"
_OPSET, _IR_VERSION = 18, 9
_FATAL_ONLY = 4
"""Errors are raised, and logged by whoever they reach; a run that was stopped is none."""
_WIDE_BELOW_BYTES, _PACKED_BELOW_BYTES = 512 << 20, 1 << 30
"""Up to the first size a wide session has a copy of the weights, up to the second a narrow one."""


class Spinning(StrEnum):
    """When the threads of a run wait for more work without giving up their cores."""

    NEVER = "never"
    WITHIN = "within"
    """While a run lasts."""
    ALWAYS = "always"
    """After it too: threads of several sessions then take cores from one another."""


class Threads(msgspec.Struct, frozen=True):
    """How a run uses cores: on so many threads, and how these wait."""

    per_run: int = 1
    spinning: Spinning = Spinning.WITHIN


_ONE_THREAD = Threads()


class Stop:
    """Ends the run it was given to, called from any thread.

    Args:
        lean: memory is short, so what the run leaves unused is given back after it.
    """

    def __init__(self, *, lean: bool = False) -> None:
        self.lean = lean
        self.options = ort.RunOptions()
        self.options.log_severity_level = _FATAL_ONLY
        if lean:
            self.shrink(_ARENA)

    def shrink(self, arenas: str) -> None:
        """The run's arenas, such as `cpu:0;gpu:1`, give back what it leaves unused.

        One that the session does not have fails the run.
        """
        self.options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arenas)

    def __call__(self) -> None:
        """The run fails with `SessionError` at the graph's next node."""
        self.options.terminate = True

    @property
    def called(self) -> bool:
        """Whether the run is to end."""
        return bool(self.options.terminate)


class Session(Protocol):
    """What the batcher needs of a model."""

    @property
    def provider(self) -> str:
        """The execution provider really in use, in ONNX Runtime's spelling."""

    @property
    def precision(self) -> Precision:
        """What it computes in."""

    @property
    def threads(self) -> Threads:
        """How a run uses cores."""

    @property
    def has_wide(self) -> bool:
        """Whether a run may be wide."""

    @property
    def costs_above(self) -> int:
        """Tokens above which what a run takes says what others take; 0, or where graphs end."""

    @property
    def resident_bytes(self) -> int:
        """Size of the graph and its weights, as often as they are held."""

    @property
    def padded(self) -> bool:
        """Whether every text is computed as long as its batch's longest."""

    def run(
        self, items: Sequence[Item], /, *, wide: bool = False, stop: Stop | None = None
    ) -> Vectors:
        """Raw vectors, in order; raises `SessionError`.

        `wide` says that nothing else runs, so that one run may use all cores; `stop` ends it, but
        for a CUDA graph, which takes no time.
        """

    def sample(self, tokens: int) -> Item:
        """An input of about so many tokens, to measure with."""


LayoutOf = Callable[[Sequence[Value], Sequence[Value]], Layout]
"""Chooses a layout by a graph's inputs and outputs; raises `LayoutError`."""


class OnnxSession:
    """A graph on ONNX Runtime.

    Args:
        path: the ONNX file.
        cores: threads of a wide run.
        threads: of all others.
        layout: how texts are laid out for it.
        projections: a graph of what follows pooling, where that is not in the graph itself.
        precision: what the graph computes in, there.
        providers: what it runs on.
        reproducible: run every text alone, on one thread, so that no bit of its vector depends on
            what else there is to do.
        calls: who else calls CUDA.
        graph_tokens: small batches are CUDA graphs if that is good, of texts of so many tokens.

    Raises:
        FellBackError: it would run on another provider.
        SessionError: the file is missing, or no graph that can be used.
    """

    def __init__(
        self,
        path: Path,
        cores: int,
        threads: Threads = _ONE_THREAD,
        *,
        layout: LayoutOf = Packed,
        projections: Path | None = None,
        precision: Precision = Precision.FP32,
        providers: Providers = ON_CPU,
        reproducible: bool = False,
        calls: Calls | None = None,
        graph_tokens: int = 0,
    ) -> None:
        self.costs_above = 0
        self.precision = precision
        (self.provider, options), *_ = providers
        on_cpu = self.provider == CPU
        calls = calls or Calls()
        self._calling = nullcontext if on_cpu else calls.shared
        self._arenas = "" if on_cpu else f"{_ARENA};gpu:{options['device_id']}"
        self.threads = _ONE_THREAD if reproducible else threads
        self._reproducible = reproducible
        weights = _Weights(path)
        with self._calling():
            self._narrow = self._wide = _open(
                path, self.threads, packed=weights.packed, providers=providers
            )
        self.resident_bytes = weights.bytes
        if cores > self.threads.per_run and not reproducible and on_cpu:
            if weights.bytes <= _WIDE_BELOW_BYTES:
                self._wide = _open(path, Threads(cores))
                self.resident_bytes += weights.bytes
            elif weights.mapped:
                self._wide = _open(path, Threads(cores), packed=False)
        self.has_wide = self._wide is not self._narrow
        try:
            self._layout = layout(
                _declared(self._narrow.get_inputs()), _declared(self._narrow.get_outputs())
            )
        except LayoutError as exc:
            raise SessionError(f"{path}: {exc}") from exc
        self.padded = self._layout.padded
        self._projections = None
        if projections and not self._layout.final:
            with self._calling():
                self._projections = _open(projections, self.threads, providers=providers)
            self.resident_bytes += projections.stat().st_size
        self._captured: Captured | None = None
        halved = precision in (Precision.FP16, Precision.BF16)
        small = halved and self.provider == CUDA and weights.bytes <= MOST_WEIGHTS
        if graph_tokens and small and isinstance(self._layout, Packed):
            self._captured = capture(
                partial(_open, path, self.threads, providers=capturing(providers)),
                self._narrow,
                self._layout,
                where=("cuda", int(options["device_id"])),
                max_tokens=graph_tokens,
                calls=calls,
                graph=path,
            )
        if self._captured:
            self.resident_bytes += weights.bytes
            self.costs_above = max(self._captured.sizes)

    def run(
        self, items: Sequence[Item], *, wide: bool = False, stop: Stop | None = None
    ) -> Vectors:
        """See `Session`."""
        if self._reproducible and len(items) > 1:
            return [self.run([one], stop=stop)[0] for one in items]
        session, layout = self._wide if wide else self._narrow, self._layout
        options = stop.options if stop else None
        lean = bool(stop and stop.lean)
        if stop and lean and self._arenas:
            stop.shrink(self._arenas)
        with translated(), self._calling():
            value = self._captured.run(items) if self._captured and not lean else None
            if value is None:
                (value,) = session.run([layout.output], layout.feeds(items), options)
            vectors = layout.vectors(value, items)
            if self._projections:
                (vectors,) = self._projections.run(None, {"vectors": vectors}, options)
        return vectors

    def sample(self, tokens: int) -> Item:
        """See `Session`."""
        return self._layout.sample(tokens)


def _declared(values: Sequence[Any]) -> list[Value]:
    return [Value(one.name, one.type, one.shape) for one in values]


def activations(
    path: Path, outputs: Sequence[str], texts: Sequence[Ids], rows: int
) -> dict[str, NDArray[np.float32]]:
    """A few rows per text, the same ones every time, of outputs of shape (tokens, width)."""
    session, random = _open(path, _ONE_THREAD), np.random.default_rng(0)
    found: Mapping[str, list[NDArray[np.float32]]] = {name: [] for name in outputs}
    for ids in texts:
        kept = random.permutation(len(ids))[:rows]
        try:
            values = session.run(outputs, Packed().feeds([ids]))
        except Exception as exc:  # ONNX Runtime's exceptions share no base class
            raise SessionError(str(exc)) from exc
        for name, value in zip(outputs, values, strict=True):
            found[name].append(value[kept])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def outputs(path: Path, ids: Ids) -> dict[str, NDArray[np.float32]]:
    """Everything that a graph of `convert` gives for one text; raises `SessionError`."""
    session = _open(path, _ONE_THREAD)
    feeds = Packed(_declared(session.get_inputs())).feeds([ids])
    names = [one.name for one in session.get_outputs()]
    with translated():
        return dict(zip(names, session.run(names, feeds), strict=True))


class _Weights:
    """What lies in a graph's files.

    ONNX Runtime repacks weights for its matrix products when it opens a graph: a copy, which makes
    runs of few tokens 1.4 times as fast and long ones 1.05 times. Without it, weights that lie
    beside the graph are pages of their file, which sessions share and the system may drop.
    """

    def __init__(self, path: Path) -> None:
        beside = {*path.parent.glob(f"{path.name}*"), *path.parent.glob("weights-*")}
        graph = path.stat().st_size if path.exists() else 0
        self.bytes = sum(file.stat().st_size for file in beside)
        self.mapped = graph < self.bytes // 10
        self.packed = self.bytes <= _PACKED_BELOW_BYTES or not self.mapped


def _open(
    path: Path, threads: Threads, *, packed: bool = True, providers: Providers = ON_CPU
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads.per_run
    options.inter_op_num_threads = 1
    # Shapes change with every batch: a recorded memory pattern never fits the next one.
    options.enable_mem_pattern = False
    spinning = "0" if threads.spinning is Spinning.NEVER else "1"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    if threads.spinning is Spinning.WITHIN:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = _FATAL_ONLY
    (asked, own), *_ = providers
    for name, value in own.items():
        if name.endswith("_cache_path"):
            Path(value).mkdir(parents=True, exist_ok=True)  # ONNX Runtime makes no parents
    with translated(f"{path}: "):
        try:
            session = _session(path, options, providers)
        except Exception:
            # A graph for CUDA cannot be opened by a CPU to find out.
            _require(asked, _session(_nothing(), options, providers))
            raise
        _require(asked, session)
        return session


def _session(
    graph: Path | bytes, options: ort.SessionOptions, providers: Providers
) -> ort.InferenceSession:
    # Its Python code would print, and try other providers than these.
    return ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)


def _require(asked: str, session: ort.InferenceSession) -> None:
    """A library that cannot be loaded is only logged (onnxruntime#23612, #23372)."""
    if (used := session.get_providers()[0]) != asked:
        raise FellBackError(
            f"{asked} was asked for, and ONNX Runtime fell back to {used}: see what"
            " `embedding-server doctor` says is missing"
        )


def _nothing() -> bytes:
    """A graph that gives what it takes."""
    value = onnx.helper.make_tensor_value_info("none", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "nothing", [value], [value])
    opset = onnx.helper.make_opsetid("", _OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
