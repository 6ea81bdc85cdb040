"""The self-check: what a model must show before anybody's request reaches it.

What it gives is compared with what fp32 on the CPU once gave (`references`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedding_server.core import (
    SPARSE,
    Item,
    Kind,
    ModelSpec,
    Precision,
    Vector,
    normalized,
    values,
)
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Session

_TOLERANCE = 1e-4
"""Between a vector alone and among others, for length 1; measured on CPUs: under 1e-6."""
_TOLERANCES = {Precision.TF32: 2e-3, Precision.FP16: 1e-2, Precision.BF16: 4e-2}
"""On GPUs, where another shape is another order of sums, and roundings follow: not measured yet."""
_LEAST_COSINE, _SCORES_OFF, _SCORES_OFF_IN_HALVES = 0.999, 1e-3, 5e-2
"""Against fp32; scores relative to their size, if that is above 1."""
_MAY_BE_ZERO = (Kind.CROSS, Kind.STATIC, Kind.SPARSE)
"""Kinds for which a text may hold nothing."""


class CheckError(Exception):
    """The model does not do what it should; the message says what it did."""


class NeighboursError(CheckError):
    """What the model makes of a text depends on what it is batched with."""


def check(spec: ModelSpec, items: Sequence[Item], session: Session) -> list[Vector]:
    """Run a few inputs together and alone; returns what each gives alone.

    Raises:
        NeighboursError: vectors depend on their neighbours.
        CheckError: they have the wrong form, or are not finite.
    """
    together = session.run(items)
    if len(together) != len(items):
        raise CheckError(f"{len(together)} vectors of {len(items)} inputs")
    apart = run_apart(session, items)
    for vector, alone in zip(together, apart, strict=True):
        for one in (vector, alone):
            _check_form(spec, one)
        length = float(np.linalg.norm(values(alone)))
        if not (np.isfinite(values(vector)).all() and np.isfinite(length)):
            raise CheckError("the self-check gave vectors that are not finite")
        if not length and spec.kind not in _MAY_BE_ZERO:
            raise CheckError("the self-check gave a vector of zeros")
        scale = max(length, 1.0) if spec.kind in _MAY_BE_ZERO else length
        difference = _difference(vector, alone) / scale
        if difference > tolerance(session):
            raise NeighboursError(
                f"a text's vector differs by {difference:.1e} with its neighbours"
            )
    return apart


def tolerance(session: Session) -> float:
    """How far a vector may be from what it is alone; on a CPU half precision is its weights'."""
    on_cpu = session.provider == CPU
    return _TOLERANCE if on_cpu else _TOLERANCES.get(session.precision, _TOLERANCE)


def run_apart(session: Session, items: Sequence[Item]) -> list[Vector]:
    """The vector of each input alone."""
    return [vector for item in items for vector in session.run([item])]


def compare(
    kind: Kind,
    vectors: Sequence[Vector],
    expected: Sequence[Vector],
    precision: Precision = Precision.FP32,
) -> None:
    """Compare vectors of a precision with those of fp32, of the same inputs.

    Raises:
        CheckError: the least cosine, of late interaction that of any token, is too small, or a
            cross-encoder's score is off.
    """
    pairs = [_aligned(*pair) for pair in zip(vectors, expected, strict=True)]
    if kind is Kind.CROSS:
        most = _SCORES_OFF if precision is Precision.FP32 else _SCORES_OFF_IN_HALVES
        off = np.max([np.abs(a - b) / np.maximum(1.0, np.abs(b)) for a, b in pairs])
        if not off <= most:
            raise CheckError(f"a score differs by {off:.1e} from fp32's, more than {most}")
        return
    least = np.min([_cosine(*pair) for pair in pairs])  # which keeps what is no number
    if not least >= _LEAST_COSINE:
        raise CheckError(
            f"the least cosine with fp32's vectors is {least:.4f}, not {_LEAST_COSINE}"
        )


def _cosine(one: Vector, other: Vector) -> float:
    """The least one of any row; of rows of zeros it is 1."""
    same = (one == other).all(axis=-1)
    cosines = np.vecdot(normalized(np.atleast_2d(one)), normalized(np.atleast_2d(other)))
    return float(np.where(same, 1.0, cosines).min(initial=1.0))


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
    one, other = _aligned(one, other)
    return float(np.abs(one - other).max(initial=0.0))


def _aligned(one: Vector, other: Vector) -> tuple[Vector, Vector]:
    """Two vectors of an input, sparse ones over the indices of both."""
    if one.dtype == SPARSE:
        span = np.union1d(one["index"], other["index"])
        one, other = _spread(one, span), _spread(other, span)
    if one.shape != other.shape:
        raise CheckError(f"an input's vectors have shapes {one.shape} and {other.shape}")
    return one, other


def _spread(vector: Vector, span: NDArray[np.int64]) -> NDArray[np.float32]:
    spread = np.zeros(len(span), np.float32)
    spread[np.searchsorted(span, vector["index"])] = vector["value"]
    return spread
