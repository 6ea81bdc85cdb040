"""A `ModelSpec` -> a `Model` that has proved itself on this machine."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from embedding_server.catalog import FilesError, ModelFilesError
from embedding_server.convert import ConvertError
from embedding_server.core import Kind, ModelSpec, Precision
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.session import Session, SessionError
from embedding_server.runtime.tokenizer import Tokenizer, TokenizerError
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.device import Device
from embedding_server.serving.model import Model
from embedding_server.serving.source import RunPlan, Source

_CHECK_TEXTS = ("", "a", "The model answers before anybody asks.")
_CHECK_PAIRS = [("What answers?", text) for text in _CHECK_TEXTS]
_CHECK_TOLERANCE = 1e-4
"""Between a text alone and among others, for vectors of length 1; measured: under 1e-6."""


class LoadError(Exception):
    """The model cannot serve; the message says which file or check is the reason.

    `retry`: another try soon may work.
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.retry = retry


class Loader:
    """Loads models onto one device, one after the other: a measurement needs the machine.

    Args:
        device: whose cores the models share.
        plan: how they run.
        locator: finds or fetches a model's files; blocks.
        tokenizing: a thread for tokenising off the event loop.
    """

    def __init__(
        self,
        device: Device,
        plan: RunPlan,
        locator: Callable[[ModelSpec], ModelSpec],
        tokenizing: Executor,
        metrics: Metrics,
    ) -> None:
        self._device = device
        self._plan = plan
        self._locator = locator
        self._tokenizing = tokenizing
        self._metrics = metrics
        self._one_at_a_time = threading.Lock()

    def locate(self, spec: ModelSpec) -> ModelSpec:
        """The spec with its files on this machine; blocks.

        Raises:
            LoadError: they cannot be had, or are not what they should be.
        """
        try:
            return self._locator(spec)
        except FilesError as exc:
            raise LoadError(str(exc), retry=exc.retry) from exc
        except ModelFilesError as exc:
            raise LoadError(str(exc), retry=False) from exc

    def __call__(self, spec: ModelSpec) -> Model:
        """Convert, measure, open and check a model; blocks, so call it off the event loop.

        Raises:
            LoadError: a file is missing or damaged, or the model failed its self-check.
        """
        try:
            with self._one_at_a_time:
                source = Source(spec, self._plan, self._device.cores)
                runs = self._device.runs
                profile = source.profile(
                    quiet=lambda: self._device.idle and self._device.runs == runs
                )
                session = source.open(profile.way.threads)
                width = check(spec, source.tokenizer, session)
                batcher = Batcher(
                    spec.id,
                    session,
                    self._device,
                    width,
                    self._metrics,
                    profile=profile,
                    exact=None if session.precision is Precision.FP32 else source.exact,
                )
                batcher.ceiling.learn(session, spec.max_tokens)
        except (ConvertError, TokenizerError, SessionError) as exc:
            raise LoadError(str(exc)) from exc
        return Model(
            spec,
            source.tokenizer,
            batcher,
            self._tokenizing,
            self._metrics,
            fingerprint=source.fingerprint(session.provider),
            quality=profile.quality,
        )


def check(spec: ModelSpec, tokenizer: Tokenizer, session: Session) -> int:
    """Run a few texts together and alone; the width of their rows.

    Raises:
        LoadError: rows have the wrong width, are not finite, or depend on their neighbours.
    """
    scores = spec.kind is Kind.CROSS
    encodings = tokenizer.encode_pairs(_CHECK_PAIRS) if scores else tokenizer.encode(_CHECK_TEXTS)
    texts = [encoding.ids for encoding in encodings]
    together = session.run(texts)
    alone = np.concatenate([session.run([ids]) for ids in texts])
    width = 1 if scores else spec.dimensions
    if together.shape != (len(texts), width):
        raise LoadError(f"rows have shape {together.shape}, expected width {width}")
    lengths = np.linalg.norm(alone, axis=1, keepdims=True)
    if scores:
        lengths = np.maximum(lengths, 1.0)
    if not (np.isfinite(together).all() and np.isfinite(lengths).all() and lengths.all()):
        raise LoadError("the self-check gave vectors that are not finite, or zero")
    difference = float(np.max(np.abs(together - alone) / lengths))
    if difference > _CHECK_TOLERANCE:
        raise LoadError(f"a text's vector differs by {difference:.1e} with its neighbours")
    return width
