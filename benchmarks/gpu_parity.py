"""Graphs for CUDA against what transformers gives for tiny models of every family."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.gpu_runs import CPU, Place, providers
from embedding_server.core import ModelSpec, Pooling, Precision, normalized
from embedding_server.runtime.layout import Packed, Value

_LEAST_COSINE, _FP32_OFF = 0.999, 1e-5


def parity(scratch: Path, *, dry: bool) -> Iterator[tuple[str, dict[str, float | str]]]:
    """Family -> precision -> its largest difference, or 1 - the least cosine, and a verdict."""
    from tests.convert.lowering import lowered  # noqa: PLC0415 - pytest may be absent
    from tests.convert.test_families import GOLDENS, Golden, inputs  # noqa: PLC0415

    for file in GOLDENS:
        found: dict[str, float | str] = {}
        decoder = file.stem.startswith("qwen")
        wanted = [Precision.FP32, Precision.FP16] + [Precision.BF16] * decoder
        verdict = "ok"
        for precision in wanted:
            golden = Golden(file)
            directory = scratch / "parity" / file.stem / precision
            try:
                path = golden.convert(directory, precision, target="cuda")
                if dry:
                    path = lowered(path, path.with_name("lowered.onnx"))
                values = _run(path, inputs(golden.kind), scratch, dry=dry, states=golden.values)
            except Exception as exc:  # noqa: BLE001 - one family must not end the others
                found[precision], verdict = repr(exc)[:200], "FAILED"
                continue
            off, good = _off(values, golden.values, precision)
            found[precision] = off
            verdict = verdict if good else "OFF"
        yield file.stem, found | {"": verdict}


def _run(
    path: Path, items: list[np.ndarray], scratch: Path, *, dry: bool, states: np.ndarray
) -> np.ndarray:
    spec = ModelSpec(id="m", pooling=Pooling.MEAN, max_tokens=64, dimensions=0)
    given = [CPU] if dry else providers(Place(spec, scratch, dry), tf32=False)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=given)
    declared = [Value(one.name, one.type, one.shape) for one in session.get_inputs()]
    names = {one.name for one in session.get_outputs()}
    per_token = len(states) == sum(map(len, items)) and "token_embeddings" in names
    output = "token_embeddings" if per_token else "sentence_embedding"
    return np.asarray(session.run([output], Packed(declared).feeds(items))[0])


def _off(values: np.ndarray, expected: np.ndarray, precision: Precision) -> tuple[float, bool]:
    scale = max(1.0, float(np.abs(expected).max()))
    largest = float(np.abs(values - expected).max()) / scale
    if precision is Precision.FP32:
        return largest, largest <= _FP32_OFF
    if expected.shape[1] <= 3:
        return largest, largest <= (0.02 if precision is Precision.FP16 else 0.1)
    cosine = float(np.vecdot(normalized(values), normalized(expected)).min())
    return 1 - cosine, cosine >= _LEAST_COSINE
