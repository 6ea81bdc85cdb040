"""What a model computes in, of what was asked for and what the device has."""

from embedding_server.convert import model_type, stored_precision
from embedding_server.core import ModelSpec, Precision
from embedding_server.serving.plan import RunPlan


def of_graph(spec: ModelSpec, plan: RunPlan) -> Precision:
    """The precision of a model's graph; its own comes before the plan's.

    On a CPU, rounding weights to what they are is computing in fp32.
    """
    if spec.file and spec.overrides.file:
        return Precision.FP32  # the file that an operator chose is what it is
    precision = spec.precision or plan.precision or _usual(spec, plan)
    if precision is Precision.TF32:
        return Precision.FP32
    in_fp32 = plan.compute.on_cpu and not spec.file
    as_stored = in_fp32 and stored_precision(spec.directory) is precision
    return Precision.FP32 if as_stored else precision


def chosen_here(spec: ModelSpec, plan: RunPlan) -> bool:
    """Whether nobody asked for the half precision that it has."""
    asked = spec.precision or plan.precision
    return not asked and not plan.compute.on_cpu and of_graph(spec, plan) is not Precision.FP32


def tf32(spec: ModelSpec, plan: RunPlan) -> bool | None:
    """Whether TF32 was asked for; None: neither it nor fp32 was."""
    precision = spec.precision or plan.precision
    return precision is Precision.TF32 if precision in (Precision.TF32, Precision.FP32) else None


def _usual(spec: ModelSpec, plan: RunPlan) -> Precision:
    if spec.fastembed:
        return Precision.FP32  # which stays on the CPU
    if not spec.file and model_type(spec.directory) == "qwen3":
        return plan.qwen3
    return Precision.FP32 if plan.compute.on_cpu else Precision.FP16
