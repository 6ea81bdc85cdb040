"""Where sessions come from: one model's graph, tokenizer and profile on this machine."""

import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import msgspec
import numpy as np

from embedding_server.convert import (
    WEIGHTS,
    Int8,
    Progress,
    content_hash,
    convert,
    convert_layers,
    convert_projections,
    convertible,
    halved,
    intact,
    weight_files,
)
from embedding_server.core import Item, Kind, ModelSpec, Precision, Text, normalized
from embedding_server.runtime.cores import sums_bytes_exactly
from embedding_server.runtime.encoder import Encoder
from embedding_server.runtime.errors import (
    DeviceError,
    FellBackError,
    OutOfMemoryError,
    SessionError,
)
from embedding_server.runtime.layout import Packed
from embedding_server.runtime.providers import CPU, CUDA, TENSORRT, Compute, Part, Providers
from embedding_server.runtime.replicas import Replicas
from embedding_server.runtime.session import (
    VERSION,
    LayoutOf,
    OnnxSession,
    Session,
    Threads,
    activations,
)
from embedding_server.serving import profile as profiles
from embedding_server.serving.compute import opened_with
from embedding_server.serving.kinds import calibrating, encoder_of, layout_of, probes
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.precision import of_graph, tf32
from embedding_server.serving.profile import Profile, Quality, device_name
from embedding_server.serving.texts import CALIBRATION, JUDGEMENT
from embedding_server.serving.tuning import batch, best_way, ways

_DECIDING = ("tokenizer.json", "preprocessor_config.json")
_ROWS_PER_TEXT = 12
_COMPARED_TOKENS, _COMPARED_RUNS = 512, 5
_LARGEST_COMPARED = 2 << 30
_REFERENCES = 1
"""Raise it whenever the same files are to give other vectors."""


class Source:
    """One model's graph and tokenizer, which sessions are opened from.

    `progress` is told how far a conversion is; None: the log is.

    Raises:
        ConvertError, TokenizerError, SessionError: a file is missing or damaged.
    """

    def __init__(
        self, spec: ModelSpec, plan: RunPlan, cores: int, progress: Progress | None = None
    ) -> None:
        self._spec, self._plan = spec, plan
        self.precision = of_graph(spec, plan)
        """What its graph computes in."""
        self._cores = cores
        self.encoder = encoder_of(spec, plan.max_image_pixels)
        self._layout: LayoutOf
        self._int8: Int8 | None = None
        self._projections = None
        if spec.projections:
            self._projections = convert_projections(spec.directory, spec.projections, plan.cache)
        exact = self.precision is Precision.FP32
        exported = exact or spec.kind is not Kind.DENSE or not convertible(spec.directory)
        if spec.file and exported:
            self._graph = self._in_precision(spec.directory / spec.file)
            self._layout = layout_of(spec, self.encoder)
            return
        self._layout = partial(Packed, pooling=spec.pooling)
        if self.precision is Precision.INT8:
            if spec.kind is Kind.CROSS:
                raise SessionError(f"int8 is not for cross-encoders: give {spec.id} another one")
            self._int8 = int8_graphs(self.encoder)
        no_bf16 = self.precision is Precision.BF16 and not plan.compute.has_bf16
        self._graph = convert(
            spec,
            plan.cache,
            rounded=self._rounded,
            int8=self._int8,
            progress=progress,
            target="cuda" if plan.compute.choice.first == CUDA else "cpu",
            computed=Precision.FP32 if no_bf16 else None,
        )

    def _in_precision(self, graph: Path) -> Path:
        """An exported graph of float32, as it is to be run."""
        provider = self._plan.compute.choice.first
        if self.precision is Precision.FP32:
            return graph
        if provider == TENSORRT and self.precision is not Precision.INT8:
            return graph  # which it turns into what it is told to
        if provider == CUDA and self.precision is Precision.FP16:
            return halved(graph, self._plan.cache)
        raise SessionError(
            f"{self.precision} needs {WEIGHTS} of a family that is known, {self._spec.id} is an"
            " exported graph: change"
            " INFERENCE_PRECISION, or its precision in INFERENCE_MODEL_CONFIG"
        )

    @property
    def _rounded(self) -> Precision:
        """What weights are rounded to."""
        return Precision.FP32 if self._int8 else self.precision

    @property
    def converted(self) -> Path | None:
        """The graph that was made of the model's weights; None: it came with one."""
        return self._graph if self._made else None

    def with_layers(self, out: Path) -> Path:
        """The graph for a CPU again, in the directory `out`: it gives every layer's states too."""
        return convert_layers(self._spec, out, rounded=self._rounded, int8=self._int8)

    @property
    def fixed_threads(self) -> Threads | None:
        """What the settings, or a GPU, leave no choice about."""
        if self._plan.reproducible or not self.on_cpu:
            return Threads()
        wanted = min(self._plan.threads_per_run, self._cores)
        return Threads(wanted) if wanted else None

    def open(self, threads: Threads, *, wide: bool = True, apart: bool = False) -> Session:
        """A session, on every GPU there is; a damaged graph is dropped and made anew next time.

        Args:
            threads: of a run.
            wide: a second session for lone runs, on all cores, or for small ones on a GPU.
            apart: run every text alone.
        """
        if self._spec.fastembed:
            # Here, because its libraries take half a second.
            from embedding_server.catalog.objects import ObjectSession  # noqa: PLC0415

            return ObjectSession(self._spec, threads)
        graphs = self._plan.cuda_graphs and wide and not apart
        try:
            sessions = [
                OnnxSession(
                    self._graph,
                    self._cores if wide else threads.per_run,
                    threads,
                    layout=self._layout,
                    projections=self._projections,
                    precision=precision,
                    providers=providers,
                    reproducible=self._plan.reproducible or apart,
                    calls=self._plan.compute.calls,
                    graph_tokens=self.encoder.max_tokens if graphs else 0,
                )
                for providers, precision in self._providers
            ]
        except SessionError as exc:
            if not (intact(self._graph) and (isinstance(exc, DeviceError) or not self.on_cpu)):
                made = (self._graph if self._made else None, self._projections)
                for graph in filter(None, made):
                    shutil.rmtree(graph.parent, ignore_errors=True)
            raise
        return sessions[0] if len(sessions) == 1 else Replicas(sessions)

    def exact(self) -> Session:
        """A session of the same model in fp32, on the same device if it has room."""
        with suppress(FellBackError, OutOfMemoryError):
            return self._in_fp32(self._plan.compute).open(Threads(), wide=False)
        return self.reference()

    def reference(self) -> Session:
        """A session of the same model in fp32, on the CPU and one thread."""
        return self._in_fp32().open(Threads(), wide=False)

    def profile(self, quiet: Callable[[], bool] = lambda: True) -> Profile:
        """What is stored for this model and machine, else what is measured now.

        It is measured while `quiet` holds: nothing else uses the machine. Otherwise the machine is
        left to those who use it, and what is returned is the default, or what was seen so far.
        """
        profile = profiles.stored(self.profile_path)
        if profile and profile.seconds >= self._plan.warmup:
            return profile
        profile = self._measure(quiet)
        if self._plan.warmup and quiet():
            profiles.store(profile, self.profile_path)
        return profile

    @property
    def profile_path(self) -> Path:
        """Where the profile is kept."""
        where = self._where or f"{CPU} {device_name()}"
        machine = f"{where} {self._cores}"
        key = f"{self._identity} {machine} {self.fixed_threads}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._plan.cache.expanduser() / "profiles" / f"{name}.json"

    @property
    def reference_path(self) -> Path | None:
        """Where fp32's vectors of the probes are kept; None for models over 2 GB."""
        held_in_half = self.precision is not Precision.FP32 and not self._plan.compute.on_cpu
        if self._bytes * (1 + held_in_half) > _LARGEST_COMPARED:
            return None
        if self.precision is not Precision.FP32 or not self._plan.compute.on_cpu:
            return self._in_fp32().reference_path
        return self._vectors_path("references", self._content, probes(self._spec))

    @property
    def calibration_path(self) -> Path:
        """Where vectors that tell their range are kept, whatever precision they were made in.

        Raises:
            ConvertError: a file cannot be read.
        """
        spec, directory = self._spec, self._spec.directory
        files = [directory / name for name in _DECIDING if (directory / name).exists()]
        graph = _graph_files(directory / spec.file) if spec.file else []
        files += graph or [*weight_files(directory), directory / "config.json"]
        projections = self._projections.parent.name if self._projections else ""
        content = [content_hash(path, self._plan.cache) for path in files]
        key = f"{content} {spec.pooling} {projections}"
        return self._vectors_path("calibrations", key, calibrating(spec))

    def fingerprint(self, provider: str) -> str:
        """16 hex digits over everything that decides a vector's bits.

        That is the graph (weights, pooling, precision), tokenizer and limit, provider and runtime
        version, a GPU's kind and whether CUDA graphs may be used, which fill batches up.
        """
        where = provider if provider == CPU else self._where or provider
        graphs = self._plan.cuda_graphs and provider == CUDA
        key = f"{self._identity} {self._spec.max_tokens} {where}{' graphs' * graphs}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    @property
    def judged(self) -> bool:
        """Whether it has a quality: vectors of a reduced precision do."""
        return self.precision is not Precision.FP32 and self._spec.kind is Kind.DENSE

    def quality(self, session: Session | None = None) -> Quality:
        """What the reduced precision is worth, against fp32; `session` has one thread per run."""
        session = session or self.open(Threads(), wide=False)
        exact = self.exact()
        texts = [encoding.item for encoding in self.encoder.encode(JUDGEMENT)]
        rows, expected = (normalized(one.run(texts)) for one in (session, exact))
        cosines = np.vecdot(rows, expected)
        mixed = batch(session, _COMPARED_TOKENS, self.encoder.max_tokens)
        times = [(_time(session, mixed), _time(exact, mixed)) for _ in range(_COMPARED_RUNS)]
        return Quality(
            cosine=round(float(cosines.min()), 4),
            speed=round(statistics.median(slow / fast for fast, slow in times), 2),
        )

    def _in_fp32(self, compute: Compute = Compute()) -> "Source":  # noqa: B008 - frozen
        spec = msgspec.structs.replace(self._spec, precision=Precision.FP32)
        return Source(spec, msgspec.structs.replace(self._plan, compute=compute), 1)

    @property
    def _bytes(self) -> int:
        """Of the graph and its weights."""
        return sum(path.stat().st_size for path in _graph_files(self._graph))

    @property
    def _made(self) -> bool:
        """Whether the graph is ours, and can be made again."""
        return self._graph != self._spec.directory / (self._spec.file or "")

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs there."""
        return self._plan.compute.on_cpu or bool(self._spec.fastembed)

    @cached_property
    def _providers(self) -> list[tuple[Providers, Precision]]:
        """What the session on each device is opened with, and what it then computes in."""
        part = Part(
            graph=self._graph,
            content="" if self._plan.compute.on_cpu else self._content,
            precision=self.precision,
            tf32=tf32(self._spec, self._plan),
            weights=self._bytes,
        )
        return opened_with(self._plan.compute, part, self.encoder.max_tokens)

    @property
    def _where(self) -> str:
        """What computes, where it is a GPU: it decides the last bits, and how fast they come."""
        if self.on_cpu:
            return ""
        (providers, precision), *_ = self._providers
        names = ",".join(name for name, _ in providers)
        return f"{names} {self._plan.compute.where} {precision}"

    @property
    def _identity(self) -> str:
        return f"{self._content} {VERSION} {'reproducible' * self._plan.reproducible}"

    def _vectors_path(self, folder: str, content: str, inputs: Sequence[Text]) -> Path:
        """Where raw vectors of inputs are kept, under what decides them."""
        spec = self._spec
        encoded = (inputs, spec.max_tokens, spec.pad, spec.markers, spec.template)
        how = (spec.fastembed, spec.overrides.pooling)
        key = f"{_REFERENCES} {content} {encoded} {how}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._plan.cache.expanduser() / folder / f"{name}.npz"

    @cached_property
    def _content(self) -> str:
        """Graph and what encodes for it by content; 8-bit graphs come out of a measurement."""
        digest = hashlib.sha256()
        for name in _DECIDING:
            if (path := self._spec.directory / name).exists():
                digest.update(path.read_bytes())
        if self._spec.file or self.precision is Precision.INT8:
            for path in _graph_files(self._graph):
                # The name of a graph of ours has its weights' hash in it.
                if self._spec.file or path.name.startswith(self._graph.name):
                    digest.update(content_hash(path, self._plan.cache).encode())
        words = (
            "" if self._spec.file else self._graph.parent.name,
            self._spec.pooling,
            self._projections.parent.name if self._projections else "",
            f"{self._spec.markers or ''}{self._spec.template or ''}",
        )
        digest.update(" ".join(words).encode())
        return digest.hexdigest()

    def _measure(self, quiet: Callable[[], bool]) -> Profile:
        half, limit = self._plan.warmup / 2 * quiet(), self.encoder.max_tokens
        way, *_ = tried = ways(self._cores, self.fixed_threads, on_cpu=self.on_cpu)
        if half:
            way = best_way(
                partial(self.open, wide=False), tried, self._cores, limit, seconds=half, quiet=quiet
            )
        session = self.open(way.threads, wide=False)
        cost, quality = profiles.measure(session, limit, half, self._cores, quiet), None
        if half and self.judged:
            with suppress(OutOfMemoryError):  # of a GPU that holds it once
                quality = self.quality(session if session.threads == Threads() else None)
        return Profile(
            cost=cost,
            way=way,
            seconds=2 * half,
            quality=quality,
            model=self._spec.id,
        )


def _graph_files(graph: Path) -> list[Path]:
    """The graph, and its external data: named after it, or the weights it was made of."""
    names = (f"{graph.name}*", "weights-*")
    return sorted(path for name in names for path in graph.parent.glob(name))


def int8_graphs(encoder: Encoder, fp32_share: float = 1 / 12) -> Int8:
    """How this server makes 8-bit graphs for a model with this encoder."""
    texts = [encoding.item for encoding in encoder.encode(CALIBRATION)]
    key = hashlib.sha256(f"{VERSION} {_ROWS_PER_TEXT}".encode())
    key.update(np.concatenate(texts).tobytes())
    return Int8(
        sample=partial(activations, texts=texts, rows=_ROWS_PER_TEXT),
        key=key.hexdigest(),
        limit=127 if sums_bytes_exactly() else 63,
        fp32_share=fp32_share,
    )


def _time(session: Session, items: Sequence[Item]) -> float:
    started = time.perf_counter()
    session.run(items)
    return time.perf_counter() - started
