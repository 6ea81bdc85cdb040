"""The self-check: what a model must show before anybody's request reaches it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedding_server.core import SPARSE, Item, Kind, ModelSpec, Vector, values
from embedding_server.runtime.session import Session

_TOLERANCE = 1e-4
"""Between a vector alone and among others, for length 1; measured: under 1e-6."""
_MAY_BE_ZERO = (Kind.CROSS, Kind.STATIC, Kind.SPARSE)
"""Kinds for which a text may hold nothing."""


class CheckError(Exception):
    """The model does not do what it should; the message says what it did."""


def check(spec: ModelSpec, items: Sequence[Item], session: Session) -> None:
    """Run a few inputs together and alone.

    Raises:
        CheckError: vectors have the wrong form, are not finite, or depend on their neighbours.
    """
    together = session.run(items)
    if len(together) != len(items):
        raise CheckError(f"{len(together)} vectors of {len(items)} inputs")
    for item, vector in zip(items, together, strict=True):
        (alone,) = session.run([item])
        for one in (vector, alone):
            _check_form(spec, one)
        length = float(np.linalg.norm(values(alone)))
        if not (np.isfinite(values(vector)).all() and np.isfinite(length)):
            raise CheckError("the self-check gave vectors that are not finite")
        if not length and spec.kind not in _MAY_BE_ZERO:
            raise CheckError("the self-check gave a vector of zeros")
        scale = max(length, 1.0) if spec.kind in _MAY_BE_ZERO else length
        difference = _difference(vector, alone) / scale
        if difference > _TOLERANCE:
            raise CheckError(f"a text's vector differs by {difference:.1e} with its neighbours")


def _check_form(spec: ModelSpec, vector: Vector) -> None:
    if spec.kind is Kind.SPARSE:
        if vector.dtype != SPARSE:
            raise CheckError("vectors are not sparse")
        largest = int(vector["index"].max(initial=0))
        # Objects count words by a hash.
        if spec.dimensions and not spec.fastembed and largest >= spec.dimensions:
            raise CheckError(f"index {largest} is not below {spec.dimensions}")
        return
    width = 1 if spec.kind is Kind.CROSS else spec.width
    axes = 2 if spec.kind is Kind.MULTI else 1
    if vector.ndim != axes or vector.shape[-1] != width:
        raise CheckError(f"a vector has shape {vector.shape}, expected width {width}")


def _difference(one: Vector, other: Vector) -> float:
    """The largest one of any number."""
    if one.dtype == SPARSE:
        span = np.union1d(one["index"], other["index"])
        one, other = _spread(one, span), _spread(other, span)
    if one.shape != other.shape:
        raise CheckError(f"shapes {one.shape} and {other.shape} with and without neighbours")
    return float(np.abs(one - other).max(initial=0.0))


def _spread(vector: Vector, span: NDArray[np.int64]) -> NDArray[np.float32]:
    spread = np.zeros(len(span), np.float32)
    spread[np.searchsorted(span, vector["index"])] = vector["value"]
    return spread
