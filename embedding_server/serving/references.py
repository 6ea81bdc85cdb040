"""What fp32 on the CPU gave for a model's probes at its first load: later loads must agree with it.

It is kept under what decides it, which neither provider, precision nor ONNX Runtime's version do:
a load with others of them is compared with what was there before.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog

from embedding_server.core import Item, ModelSpec, Precision, Vector
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Session
from embedding_server.serving.check import CheckError, compare, run_apart
from embedding_server.serving.profile import save
from embedding_server.serving.source import Source

DAMAGED = (
    *(ValueError, KeyError, EOFError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise for an npz file that is none."""

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
        expected = vectors if plain else run_apart(source.exact(), items)
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
        with np.load(io.BytesIO(path.read_bytes())) as archive:
            found = [archive[f"arr_{index}"] for index in range(len(archive.files))]
    except FileNotFoundError:
        return None
    except (OSError, *DAMAGED) as exc:
        log.warning("cache.unreadable", file=str(path), error=str(exc))
        return None
    return found if list(map(_form, found)) == list(map(_form, like)) else None


def store(vectors: Sequence[Vector], path: Path) -> None:
    """Write references."""
    content = io.BytesIO()
    np.savez(content, *vectors)
    save(content.getvalue(), path)


def _form(vector: Vector) -> tuple[object, int]:
    return vector.dtype, vector.ndim
