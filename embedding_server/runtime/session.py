"""One graph, ready to run: the only place that knows ONNX Runtime.

Sessions are called from the device's worker threads; they keep no state between calls, so several
threads may share one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from embedding_server.core import Ids, Rows

VERSION: str = ort.__version__
"""ONNX Runtime's version: part of what decides a vector's last bits."""

_ERRORS_ONLY = 3
_WIDE_BELOW_BYTES = 512 << 20
"""A wide session is a second copy of the weights; larger models do without."""


class SessionError(Exception):
    """The graph could not be opened, or failed on a batch; the message is for the log."""


class Session(Protocol):
    """What the batcher needs of a model."""

    @property
    def provider(self) -> str:
        """The execution provider really in use, in ONNX Runtime's spelling."""

    @property
    def precision(self) -> str:
        """What it computes in: `fp32`."""

    @property
    def padded(self) -> bool:
        """Whether every text is computed as long as its batch's longest."""

    def run(self, texts: Sequence[Ids], *, wide: bool = False) -> Rows:
        """Raw vectors of shape (texts, dimensions), in order; raises `SessionError`.

        `wide` says that nothing else runs, so that one run may use all cores.
        """


class PackedSession:
    """A graph of `convert`, which takes the tokens of all texts behind one another.

    Args:
        path: the ONNX file.
        threads: of a wide run; others have one.

    Raises:
        SessionError: the file is missing, or no graph that this runtime can open.
    """

    precision = "fp32"
    padded = False

    def __init__(self, path: Path, threads: int) -> None:
        self._narrow = self._wide = _open(path, 1)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        if threads > 1 and size <= _WIDE_BELOW_BYTES:
            self._wide = _open(path, threads)
        self.resident_bytes = size * (1 if self._wide is self._narrow else 2)
        """Size of the graph and its weights, as often as they are held."""
        self.provider: str = self._narrow.get_providers()[0]

    def run(self, texts: Sequence[Ids], *, wide: bool = False) -> Rows:
        """See `Session`."""
        session = self._wide if wide else self._narrow
        feeds = {
            "input_ids": np.concatenate(texts),
            "lengths": np.array([len(ids) for ids in texts], np.int64),
        }
        try:
            rows: Rows = session.run(["sentence_embedding"], feeds)[0]
        except Exception as exc:  # ONNX Runtime's exceptions share no base class
            raise SessionError(str(exc)) from exc
        return rows


def _open(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Shapes change with every batch: a recorded memory pattern never fits the next one.
    options.enable_mem_pattern = False
    # Threads that went on spinning after a wide run would take their cores from the next runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = _ERRORS_ONLY
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise SessionError(f"{path}: {exc}") from exc
