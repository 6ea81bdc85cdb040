"""A `ModelSpec` -> a `Model` that has proved itself on this machine."""

import hashlib
import shutil
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from embedding_server.convert import ConvertError, convert
from embedding_server.core import ModelSpec
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.session import VERSION, PackedSession, Session, SessionError
from embedding_server.runtime.tokenizer import Tokenizer, TokenizerError
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.device import Device
from embedding_server.serving.model import Model
from embedding_server.serving.profile import device_name, profile

_CHECK_TEXTS = ("", "a", "The model answers before anybody asks.")
_CHECK_TOLERANCE = 1e-4
"""Between a text alone and among others, for vectors of length 1; measured: under 1e-6."""


class LoadError(Exception):
    """The model cannot serve; the message says which file or check is the reason."""


class Loader:
    """Loads models onto one device.

    Args:
        device: whose run slots the models share.
        cache: directory for converted graphs.
        tokenizing: a thread for tokenising off the event loop.
        warmup: seconds that measuring a model's costs may take.
    """

    def __init__(
        self,
        device: Device,
        cache: Path,
        tokenizing: Executor,
        metrics: Metrics,
        *,
        warmup: float,
    ) -> None:
        self._device = device
        self._cache = cache
        self._tokenizing = tokenizing
        self._metrics = metrics
        self._warmup = warmup

    def __call__(self, spec: ModelSpec) -> Model:
        """Convert, open and check a model; blocks, so call it off the event loop.

        Raises:
            LoadError: a file is missing or damaged, or the model failed its self-check.
        """
        try:
            graph = convert(
                spec.directory, spec.pooling, self._cache, expected_sha256=spec.weights_sha256
            )
            tokenizer_file = spec.directory / "tokenizer.json"
            tokenizer = Tokenizer(tokenizer_file, spec.max_tokens)
            session = _open(graph, self._device.slots)
            check(spec, tokenizer, session)
            fingerprint = _fingerprint(graph, tokenizer_file, session)
            path = self._profile_path(fingerprint)
            cost = profile(session, spec.max_tokens, self._warmup, path)
        except (ConvertError, TokenizerError, SessionError) as exc:
            raise LoadError(str(exc)) from exc
        return Model(
            spec,
            tokenizer,
            Batcher(spec.id, session, self._device, spec.dimensions, self._metrics, cost=cost),
            self._tokenizing,
            self._metrics,
            fingerprint=fingerprint,
            resident_bytes=session.resident_bytes,
        )

    def _profile_path(self, fingerprint: str) -> Path:
        key = f"{fingerprint} {device_name()} {self._device.slots}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._cache.expanduser() / "profiles" / f"{name}.json"


def _open(graph: Path, threads: int) -> PackedSession:
    """The graph's session; one that cannot be opened is dropped and made anew next time."""
    try:
        return PackedSession(graph, threads)
    except SessionError:
        shutil.rmtree(graph.parent, ignore_errors=True)
        raise


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


def _fingerprint(graph: Path, tokenizer: Path, session: Session) -> str:
    """16 hex digits over everything that decides a vector's bits.

    That is weights and pooling (the graph's content hash), tokenizer, precision, provider and
    runtime version.
    """
    digest = hashlib.sha256(tokenizer.read_bytes())
    digest.update(f"{graph.parent.name} {session.precision} {session.provider} {VERSION}".encode())
    return digest.hexdigest()[:16]
