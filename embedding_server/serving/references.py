"""What fp32 on the CPU gave for a model's probes at its first load: later loads must agree with it.

It is kept under what decides it, which neither provider, precision nor ONNX Runtime's version do:
a load with others of them is compared with what was there before.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from embedding_server.core import Item, ModelSpec, Precision, Vector
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Session
from embedding_server.serving.check import CheckError, compare, run_apart
from embedding_server.serving.profile import save
from embedding_server.serving.source import Source

log = structlog.get_logger()


def hold(
    spec: ModelSpec,
    source: Source,
    session: Session,
    items: Sequence[Item],
    vectors: Sequence[Vector],
) -> None:
    """Compare a session's vectors of the probes with the stored references.

    Where there are none they are computed, by the session itself if it is fp32 on the CPU, and
    stored. Eight bits, and models that are too large to be run twice, are not compared.

    Raises:
        CheckError: they do not agree.
        SessionError: the references cannot be computed.
    """
    if session.precision is Precision.INT8 or not (path := source.reference_path):
        return
    expected: Sequence[Vector] | None = stored(path, vectors)
    if expected is None:
        plain = session.precision is Precision.FP32 and session.provider == CPU
        expected = vectors if plain else run_apart(source.reference(), items)
        store(expected, path)
    try:
        compare(spec.kind, vectors, expected, session.precision)
    except CheckError as exc:
        raise CheckError(
            f"{exc}: set INFERENCE_PRECISION=fp32; if it is, remove {path} to accept the change"
        ) from exc


def stored(path: Path, like: Sequence[Vector]) -> list[Vector] | None:
    """The references in `path`; None where there are none for vectors of this form."""
    try:
        found = list(arrays(path).values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        log.warning("cache.unreadable", file=str(path), error=str(exc))
        return None
    return found if list(map(_form, found)) == list(map(_form, like)) else None


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, in its order; objects in it are left alone.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content)) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as exc:  # numpy and zipfile raise what they like on damaged files
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc


def store(vectors: Sequence[Vector], path: Path) -> None:
    """Write references."""
    content = io.BytesIO()
    np.savez(content, *vectors)
    save(content.getvalue(), path)


def _form(vector: Vector) -> tuple[object, int]:
    return vector.dtype, vector.ndim
