"""A `ModelSpec` -> a `Model` that has proved itself on this machine."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Executor

import msgspec
import structlog

from embedding_server.catalog import FilesError, ModelFilesError
from embedding_server.convert import ConvertError
from embedding_server.core import ModelSpec, Precision
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime import foreign
from embedding_server.runtime.errors import DeviceError, DeviceLostError, SessionError
from embedding_server.runtime.foreign import ForeignIds
from embedding_server.runtime.tokenizer import TokenizerError
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.calibration import calibrated
from embedding_server.serving.check import CheckError, NeighboursError, check
from embedding_server.serving.device import Device
from embedding_server.serving.kinds import probes
from embedding_server.serving.model import Model
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.precision import chosen_here
from embedding_server.serving.references import hold
from embedding_server.serving.source import Source

_AS_WIDE = (Precision.FP32, Precision.TF32, Precision.BF16)
"""A row that is not finite in these is not finite in fp32 either: the range is the same."""

log = structlog.get_logger()


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
            foreign_ids = foreign.load() if spec.token_ids == foreign.NAME else None
            with self._one_at_a_time:
                return self._proven(spec, foreign_ids)
        except ModelFilesError as exc:
            raise LoadError(str(exc), retry=False) from exc
        except (ConvertError, TokenizerError, SessionError, CheckError) as exc:
            if isinstance(exc, DeviceLostError):
                self._device.lost = str(exc)
            with self._plan.compute.calls.shared():  # frees a session, if there was one
                traceback.clear_frames(exc.__traceback__)
            raise LoadError(str(exc)) from exc

    def _proven(self, spec: ModelSpec, foreign_ids: ForeignIds | None) -> Model:
        """The model, in fp32 where the half precision that nobody asked for does not suit it."""
        try:
            return self._opened(spec, foreign_ids)
        except (ConvertError, CheckError, SessionError) as exc:
            # No other precision would help a device.
            if isinstance(exc, DeviceError) or not chosen_here(spec, self._plan):
                raise
            log.warning("model.stays_in_fp32", model=spec.id, reason=str(exc))
        # Not above, where the exception keeps the first try's session.
        spec = msgspec.structs.replace(spec, precision=Precision.TF32)
        return self._opened(spec, foreign_ids)

    def _opened(self, spec: ModelSpec, foreign_ids: ForeignIds | None) -> Model:
        source = Source(spec, self._plan, self._device.cores)
        runs = self._device.runs
        profile = source.profile(quiet=lambda: self._device.idle and self._device.runs == runs)
        items = [one.item for one in source.encoder.encode(probes(spec))]
        session = source.open(profile.way.threads)
        try:
            apart = check(spec, items, session)
        except NeighboursError as exc:
            if chosen_here(spec, self._plan):
                raise
            # Graphs that quantise as they run take one scale for all of a batch.
            log.warning("model.runs_apart", model=spec.id, reason=str(exc))
            session = source.open(profile.way.threads, apart=True)
            apart = check(spec, items, session)
        hold(spec, source, session, items, apart)
        calibration = calibrated(spec, source, session)
        batcher = Batcher(
            spec.id,
            session,
            self._device,
            self._metrics,
            profile=profile,
            exact=None if session.precision in _AS_WIDE else source.exact,
        )
        batcher.ceiling.learn(session, source.encoder.max_tokens)
        return Model(
            spec,
            source.encoder,
            batcher,
            self._tokenizing,
            self._metrics,
            foreign=foreign_ids,
            fingerprint=source.fingerprint(session.provider),
            quality=profile.quality,
            calibration=calibration,
        )
