"""What a model computes in, of what was asked for."""

from embedding_server.convert import model_type, stored_precision
from embedding_server.core import ModelSpec, Precision


def of_graph(spec: ModelSpec, asked: Precision | None, qwen3: Precision) -> Precision:
    """The precision of a model's graph; rounding weights to what they are is computing in fp32.

    Args:
        spec: may say its own.
        asked: of all models; None: fp32.
        qwen3: in that case, of safetensors of that family.
    """
    if spec.file and spec.overrides.file:
        return Precision.FP32  # the file that an operator chose is what it is
    precision = spec.precision or asked
    if precision is Precision.TF32 or (spec.file and not precision):
        return Precision.FP32
    if not precision:
        precision = qwen3 if model_type(spec.directory) == "qwen3" else Precision.FP32
    as_stored = not spec.file and stored_precision(spec.directory) is precision
    return Precision.FP32 if as_stored else precision


def tf32(spec: ModelSpec, asked: Precision | None) -> bool | None:
    """Whether TF32 was asked for; None: neither it nor fp32 was."""
    precision = spec.precision or asked
    return precision is Precision.TF32 if precision in (Precision.TF32, Precision.FP32) else None
