"""How large the numbers of a model's vectors get: what 8-bit numbers are scaled by.

A text must always get the same bytes, so the range is the model's, never a request's. Vectors that
tell it are computed when a model is first loaded, and kept on disk.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from embedding_server.core import Item, Kind, ModelSpec, Rows
from embedding_server.runtime.session import Session
from embedding_server.serving.kinds import calibrating, finished
from embedding_server.serving.references import store, stored
from embedding_server.serving.source import Source

_MARGIN = 1.25
_AT_ONCE = 8
"""Inputs of a run: few enough for any memory, and a large model's weights are read but 5 times."""


class Calibration(msgspec.Struct, frozen=True):
    """A model's raw vectors of built-in inputs, shape (inputs, width), not normalised."""

    vectors: Rows
    limits: dict[tuple[int | None, bool], float] = msgspec.field(default_factory=dict)
    """By the arguments of `limit`, as far as it was asked."""

    def limit(self, dimensions: int | None, *, normalize: bool) -> float:
        """The largest magnitude that vectors' numbers are expected to have; 0: all are zeros.

        It is the largest of any number of the built-in inputs' vectors, cut to so many dimensions
        and then of length 1 if `normalize` says so, times a margin of 1.25. Two digits of it count:
        last bits, in which processors and batches differ, would change it otherwise.

        It is one range for all dimensions, and zero stays zero: dot products and cosines of int8
        vectors are those of the floats up to one factor. A range per dimension, as
        sentence-transformers' `quantize_embeddings` takes it, shifts and stretches each of them
        by another.
        """
        key = (dimensions, normalize)
        if key not in self.limits:
            rows = finished(
                Kind.DENSE, list(self.vectors), dimensions=dimensions, normalize=normalize
            )
            largest = float(np.abs(rows).max(initial=0.0))
            self.limits[key] = float(f"{_MARGIN * largest:.2g}")
        return self.limits[key]


def calibrated(spec: ModelSpec, source: Source, session: Session) -> Calibration | None:
    """What is stored for a model, else what its session gives now; None for other kinds.

    Raises:
        SessionError: the session fails.
    """
    if not (inputs := calibrating(spec)):
        return None
    path = source.calibration_path
    found = stored(path, [np.empty((0, spec.width), np.float32)])
    if found and found[0].shape[1] == spec.width:
        return Calibration(found[0])
    rows = _rows(session, [one.item for one in source.encoder.encode(inputs)])
    store([rows], path)
    return Calibration(rows)


def _rows(session: Session, items: Sequence[Item]) -> Rows:
    """Raw vectors, without those that a reduced precision could not hold."""
    parts = [
        np.asarray(session.run(items[start : start + _AT_ONCE]), np.float32)
        for start in range(0, len(items), _AT_ONCE)
    ]
    rows = np.concatenate(parts)
    kept: Rows = rows[np.isfinite(rows).all(axis=1)]
    return kept
