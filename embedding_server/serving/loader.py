"""A `ModelSpec` -> a `Model` that has proved itself on this machine."""

import hashlib
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from embedding_server.convert import ConvertError, Int8, convert
from embedding_server.core import Ids, ModelSpec, Precision, Rows
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.cores import sums_bytes_exactly
from embedding_server.runtime.session import (
    VERSION,
    PackedSession,
    Session,
    SessionError,
    Threads,
    activations,
)
from embedding_server.runtime.tokenizer import Tokenizer, TokenizerError
from embedding_server.serving import profile as profiles
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.device import Device
from embedding_server.serving.model import Model
from embedding_server.serving.profile import Profile, Quality, device_name
from embedding_server.serving.texts import CALIBRATION, JUDGEMENT
from embedding_server.serving.tuning import batch, best_threads
from embedding_server.settings import Settings

_CHECK_TEXTS = ("", "a", "The model answers before anybody asks.")
_CHECK_TOLERANCE = 1e-4
"""Between a text alone and among others, for vectors of length 1; measured: under 1e-6."""
_ROWS_PER_TEXT = 12
_WEIGHT_LIMITS = {True: 127, False: 63}
"""By whether the CPU adds up products of bytes exactly."""
_COMPARED_TOKENS, _COMPARED_RUNS = 512, 5

_ONE_AT_A_TIME = threading.Lock()
"""Two models measured at once would each find the machine slow."""


class LoadError(Exception):
    """The model cannot serve; the message says which file or check is the reason."""


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How models are to run, as the settings say.

    `threads_per_run` 0 and `warmup` (seconds) leave that to measurement.
    """

    cache: Path
    precision: Precision = Precision.FP32
    reproducible: bool = False
    threads_per_run: int = 0
    warmup: float = 0.0

    @classmethod
    def of(cls, settings: Settings) -> "RunPlan":
        """As the settings say."""
        auto = settings.precision == "auto"
        return cls(
            cache=settings.cache_dir,
            precision=Precision.FP32 if auto else Precision(settings.precision),
            reproducible=settings.reproducible,
            threads_per_run=settings.threads_per_run,
            warmup=settings.warmup_ms / 1000,
        )


class Loader:
    """Loads models onto one device.

    Args:
        device: whose cores the models share.
        plan: how they run.
        tokenizing: a thread for tokenising off the event loop.
    """

    def __init__(
        self, device: Device, plan: RunPlan, tokenizing: Executor, metrics: Metrics
    ) -> None:
        self._device = device
        self._plan = plan
        self._tokenizing = tokenizing
        self._metrics = metrics

    def __call__(self, spec: ModelSpec) -> Model:
        """Convert, open, check and measure a model; blocks, so call it off the event loop.

        Raises:
            LoadError: a file is missing or damaged, or the model failed its self-check.
        """
        try:
            source = Source(spec, self._plan, self._device.cores)
            session = source.open(Threads(self._plan.threads_per_run or 1))
            check(spec, source.tokenizer, session)
            profile = source.profile(session)
            if profile.threads != session.threads:
                session = source.open(profile.threads)
        except (ConvertError, TokenizerError, SessionError) as exc:
            raise LoadError(str(exc)) from exc
        batcher = Batcher(
            spec.id, session, self._device, spec.dimensions, self._metrics, cost=profile.cost
        )
        return Model(
            spec,
            source.tokenizer,
            batcher,
            self._tokenizing,
            self._metrics,
            fingerprint=source.fingerprint(session),
            resident_bytes=session.resident_bytes,
            quality=profile.quality,
        )


class Source:
    """One model's graph and tokenizer, which sessions are opened from.

    Raises:
        ConvertError, TokenizerError: a file is missing or damaged.
    """

    def __init__(self, spec: ModelSpec, plan: RunPlan, cores: int) -> None:
        self._spec = spec
        self._plan = plan
        self._cores = cores
        self._tokenizer_file = spec.directory / "tokenizer.json"
        self.tokenizer = Tokenizer(self._tokenizer_file, spec.max_tokens)
        self._graph = self._convert(plan.precision)

    def open(self, threads: Threads) -> PackedSession:
        """A session; a graph that cannot be opened is dropped and made anew next time."""
        try:
            return PackedSession(
                self._graph,
                self._cores,
                threads,
                precision=self._plan.precision,
                reproducible=self._plan.reproducible,
            )
        except SessionError:
            shutil.rmtree(self._graph.parent, ignore_errors=True)
            raise

    def profile(self, session: PackedSession) -> Profile:
        """What is stored for this model and machine, else what is measured now, and stored."""
        path = self.profile_path(session)
        profile = profiles.stored(path)
        if profile is None:
            with _ONE_AT_A_TIME:
                profile = self._measure(session)
            if self._plan.warmup:
                profiles.store(profile, path)
        return profile

    def profile_path(self, session: Session) -> Path:
        """Where the profile is kept."""
        key = f"{self.fingerprint(session)} {device_name()} {self._cores}"
        name = hashlib.sha256(f"{key} {self._plan.threads_per_run}".encode()).hexdigest()[:32]
        return self._plan.cache.expanduser() / "profiles" / f"{name}.json"

    def fingerprint(self, session: Session) -> str:
        """16 hex digits over everything that decides a vector's bits.

        That is weights, pooling and precision (the graph's content hash), tokenizer, provider and
        runtime version.
        """
        digest = hashlib.sha256(self._tokenizer_file.read_bytes())
        digest.update(f"{self._graph.parent.name} {session.provider} {VERSION}".encode())
        digest.update(b" reproducible" * self._plan.reproducible)
        return digest.hexdigest()[:16]

    def _measure(self, session: PackedSession) -> Profile:
        spec, half = self._spec, self._plan.warmup / 2
        if half and not self._plan.threads_per_run and not self._plan.reproducible:
            session = best_threads(session, self.open, self._cores, spec.max_tokens, half)
        return Profile(
            cost=profiles.measure(session, spec.max_tokens, half),
            threads=session.threads,
            quality=self._quality(session) if session.precision is Precision.INT8 else None,
        )

    def _quality(self, session: Session) -> Quality:
        exact = PackedSession(self._convert(Precision.FP32), self._cores)
        texts = [encoding.ids for encoding in self.tokenizer.encode(JUDGEMENT)]
        rows, exact_rows = _unit(session.run(texts)), _unit(exact.run(texts))
        mixed = batch(_COMPARED_TOKENS, self._spec.max_tokens)
        times = [(_time(session, mixed), _time(exact, mixed)) for _ in range(_COMPARED_RUNS)]
        return Quality(
            cosine=round(float(np.vecdot(rows, exact_rows).min()), 4),
            speed=round(statistics.median(slow / fast for fast, slow in times), 2),
        )

    def _convert(self, precision: Precision) -> Path:
        spec, int8 = self._spec, None
        if precision is Precision.INT8:
            texts = [encoding.ids for encoding in self.tokenizer.encode(CALIBRATION)]
            sample = partial(activations, texts=texts, rows=_ROWS_PER_TEXT)
            int8 = Int8(sample, _WEIGHT_LIMITS[sums_bytes_exactly()])
        return convert(
            spec.directory,
            spec.pooling,
            self._plan.cache,
            expected_sha256=spec.weights_sha256,
            int8=int8,
        )


def check(spec: ModelSpec, tokenizer: Tokenizer, session: Session) -> None:
    """Run a few texts together and alone.

    Raises:
        LoadError: rows have the wrong width, are not finite, or depend on their neighbours.
    """
    texts = [encoding.ids for encoding in tokenizer.encode(_CHECK_TEXTS)]
    together = session.run(texts)
    alone = np.concatenate([session.run([ids]) for ids in texts])
    if together.shape != (len(texts), spec.dimensions):
        raise LoadError(f"rows have shape {together.shape}, expected width {spec.dimensions}")
    lengths = np.linalg.norm(alone, axis=1, keepdims=True)
    if not (np.isfinite(together).all() and np.isfinite(lengths).all() and lengths.all()):
        raise LoadError("the self-check gave vectors that are not finite, or zero")
    difference = float(np.max(np.abs(together - alone) / lengths))
    if difference > _CHECK_TOLERANCE:
        raise LoadError(f"a text's vector differs by {difference:.1e} with its neighbours")


def _unit(rows: Rows) -> Rows:
    scaled: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def _time(session: Session, texts: Sequence[Ids]) -> float:
    started = time.perf_counter()
    session.run(texts)
    return time.perf_counter() - started
