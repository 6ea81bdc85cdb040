"""The ways `make bench-gpu` compares: each makes of batches what runs them, or says why not."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedding_server.convert import build, convert
from embedding_server.convert.graph import Target
from embedding_server.core import Ids, ModelSpec, Precision
from embedding_server.runtime.layout import Packed, Value
from embedding_server.runtime.packed import ON_HOST

Vectors = NDArray[np.float32]
Run = Callable[[], Any]
"""Runs a batch; gives vectors as numpy, or what `fetched` makes them of."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_OUTPUT = "sentence_embedding"


class SkipError(Exception):
    """This way cannot be measured here; the message says why."""


class Place(msgspec.Struct, frozen=True):
    """A model, and where it runs; `dry`: on the CPU, CUDA's operators replaced by plain ones."""

    spec: ModelSpec
    scratch: Path
    dry: bool

    @property
    def device(self) -> str:
        """As ONNX Runtime's OrtValue calls it."""
        return "cpu" if self.dry else "cuda"


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One row: `prepare` is told once about all batches; `threads` of them run at once."""

    prepare: Callable[[Place, Sequence[Sequence[Ids]]], list[Run]]
    threads: int = 1


def providers(place: Place, *, tf32: bool, captured: bool = False) -> list[Any]:
    """What a session is opened with."""
    if place.dry:
        return [CPU]
    options = {
        "device_id": "0",
        "use_tf32": str(int(tf32)),
        "enable_skip_layer_norm_strict_mode": "1",
        "enable_cuda_graph": str(int(captured)),
    }
    return [(CUDA, options), CPU]


def opened(
    place: Place,
    precision: Precision,
    *,
    tf32: bool = False,
    target: Target = "cuda",
    joined: bool = True,
    captured: bool = False,
) -> tuple[ort.InferenceSession, Packed]:
    """A session of the converted model, and its layout.

    `joined`: with sums and biases put into the nodes that follow, as `convert` does; `captured`:
    runs become CUDA graphs.
    """
    cache, names = place.scratch / ("joined" if joined else "apart"), vars(build)
    joining = names["fused"]
    names["fused"] = joining if joined else list
    try:
        path = convert(place.spec, cache, rounded=precision, target=target)
    finally:
        names["fused"] = joining
    if place.dry and target == "cuda":
        from tests.convert.lowering import lowered  # noqa: PLC0415 - for dry runs alone

        path = lowered(path, path.with_name("lowered.onnx"))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    given = providers(place, tf32=tf32, captured=captured)
    session = ort.InferenceSession(path, options, providers=given)
    if not place.dry and session.get_providers()[0] != CUDA:
        raise SkipError(f"the session fell back to {session.get_providers()[0]}")
    declared = [Value(one.name, one.type, one.shape) for one in session.get_inputs()]
    return session, Packed(declared)


def ours(place: Place, batches: Sequence[Sequence[Ids]], **how: Any) -> list[Run]:
    """The session as the server uses it: laid out, run, vectors on the host."""
    session, layout = opened(place, **how)

    def run(texts: Sequence[Ids]) -> Vectors:
        return np.asarray(session.run([_OUTPUT], layout.feeds(texts))[0])

    return [partial(run, texts) for texts in batches]


def bare(place: Place, batches: Sequence[Sequence[Ids]], **how: Any) -> list[Run]:
    """The same with all batches laid out beforehand."""
    session, layout = opened(place, **how)

    def run(feeds: Mapping[str, Any]) -> Vectors:
        return np.asarray(session.run([_OUTPUT], feeds)[0])

    return [partial(run, layout.feeds(texts)) for texts in batches]


def bound(place: Place, batches: Sequence[Sequence[Ids]], **how: Any) -> list[Run]:
    """The same with inputs that lie on the device already, and vectors that stay there.

    What it is faster than `bare` is all that bound buffers could give; `captured`, and CUDA graphs.
    """
    session, layout = opened(place, **how)

    def laid(number: int, texts: Sequence[Ids]) -> Run:
        binding, options = session.io_binding(), ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        for name, value in layout.feeds(texts).items():
            if name in ON_HOST:
                binding.bind_cpu_input(name, value)
            else:
                given = ort.OrtValue.ortvalue_from_numpy(value, place.device, 0)
                binding.bind_ortvalue_input(name, given)
        rows = ort.OrtValue.ortvalue_from_shape_and_type(
            [len(texts), place.spec.dimensions], np.float32, place.device, 0
        )
        binding.bind_ortvalue_output(_OUTPUT, rows)

        def run() -> Any:
            session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            return binding

        return run

    return [laid(number, texts) for number, texts in enumerate(batches)]


def captured(place: Place, batches: Sequence[Sequence[Ids]], **how: Any) -> list[Run]:
    """`bound`, every batch as one CUDA graph, which its first run captures."""
    if place.dry:
        raise SkipError("CPUs have no CUDA graphs")
    return bound(place, batches, captured=True, **how)


def in_torch(place: Place, batches: Sequence[Sequence[Ids]], *, half: bool) -> list[Run]:
    """Transformers with torch's scaled dot product attention, padded, mean of states."""
    if not find_spec("torch") or not find_spec("transformers"):
        raise SkipError("torch or transformers is not installed")
    import torch  # noqa: PLC0415 - may be absent
    from transformers import AutoModel  # noqa: PLC0415 - may be absent

    if not place.dry and not torch.cuda.is_available():
        raise SkipError("torch sees no card")
    device, dtype = place.device, torch.float16 if half else torch.float32
    model = AutoModel.from_pretrained(
        place.spec.directory, dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False
    )
    model = model.eval().to(device)

    def run(texts: Sequence[Ids]) -> Vectors:
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        with torch.inference_mode():
            seen = torch.from_numpy(mask).to(device, non_blocking=True)
            given = torch.from_numpy(ids).to(device, non_blocking=True)
            states = model(input_ids=given, attention_mask=seen).last_hidden_state
            weights = seen[:, :, None].to(torch.float32)
            vectors = (states.float() * weights).sum(1) / weights.sum(1)
            return np.asarray(vectors.cpu().numpy())

    return [partial(run, texts) for texts in batches]


def fetched(result: Any) -> Vectors:
    """The vectors of a run, on the host."""
    if isinstance(result, np.ndarray):
        return result
    return np.asarray(result.copy_outputs_to_cpu()[0])


_FP32, _FP16 = Precision.FP32, Precision.FP16
WAYS: dict[str, Way] = {
    "ours, fp32": Way(prepare=partial(ours, precision=_FP32)),
    "ours, tf32": Way(prepare=partial(ours, precision=_FP32, tf32=True)),
    "ours, fp16": Way(prepare=partial(ours, precision=_FP16)),
    "ours, fp16, two in flight": Way(prepare=partial(ours, precision=_FP16), threads=2),
    "bare session, fp16": Way(prepare=partial(bare, precision=_FP16)),
    "bound on the card, fp16": Way(prepare=partial(bound, precision=_FP16)),
    "captured on the card, fp16": Way(prepare=partial(captured, precision=_FP16)),
    "fp16, nothing joined": Way(prepare=partial(bare, precision=_FP16, joined=False)),
    "graph for a CPU, fp32": Way(prepare=partial(bare, precision=_FP32, target="cpu")),
    "torch SDPA, fp16": Way(prepare=partial(in_torch, half=True)),
    "torch SDPA, fp32": Way(prepare=partial(in_torch, half=False)),
}
"""Name of a row -> how it runs; the first one is what vectors of all are compared with."""
