"""Our packed graph against the padded ones that exporters write: same weights, same texts."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.peers import padded_graph
from embedding_server.core import Ids
from embedding_server.runtime.session import Session

_BATCHES = {
    "16 texts of 16 tokens": [16] * 16,
    "8 texts of 64 tokens": [64] * 8,
    "1 text of 256 tokens": [256],
    "1 text of 512 tokens": [512],
    "16 texts of 8 to 68 tokens": list(range(8, 72, 4)),
}
_ROUNDS = 15


def speedups(session: Session, directory: Path) -> dict[str, dict[str, float]]:
    """Other graph -> batch -> how many times as fast ours is, on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        padded = Path(scratch, "padded.onnx")
        padded_graph(directory, padded)
        found = {"padded": compare(session, padded)}
        if find_spec("torch") and find_spec("transformers"):
            exported = Path(scratch, "torch.onnx")
            _export(directory, exported)
            found["torch's export"] = compare(session, exported)
    return found


def compare(session: Session, path: Path) -> dict[str, float]:
    """The same against one graph with the inputs and the first output of an exported BERT."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    other = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {one.name for one in other.get_inputs()}
    result = {}
    for name, lengths in _BATCHES.items():
        texts = [np.random.default_rng(0).integers(1000, 20_000, length) for length in lengths]
        feeds = {key: value for key, value in _padded(texts).items() if key in names}
        result[name] = _faster(partial(session.run, texts), partial(other.run, None, feeds))
    return result


def relative_speed(session: Session, other: Session, texts: Sequence[Ids]) -> float:
    """How many times as fast `session` runs these texts as one batch."""
    return _faster(partial(session.run, texts), partial(other.run, texts))


def _faster(one: Callable[[], object], other: Callable[[], object]) -> float:
    """By medians of interleaved runs."""
    times = [(_time(one), _time(other)) for _ in range(_ROUNDS)]
    return statistics.median(slow for _, slow in times) / statistics.median(
        fast for fast, _ in times
    )


def _padded(texts: Sequence[Ids]) -> dict[str, NDArray[np.int64]]:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _export(directory: Path, path: Path) -> None:
    """What torch itself writes for these weights."""
    import torch  # noqa: PLC0415 - may be absent
    from transformers import AutoModel  # noqa: PLC0415 - may be absent

    names = ["input_ids", "attention_mask", "token_type_ids"]
    states = "last_hidden_state"

    class States(torch.nn.Module):  # type: ignore[misc]
        """The model with tensors in and a tensor out, which is what can be traced."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(directory, attn_implementation="eager")

        def forward(self, *inputs: object) -> object:
            return self.model(**dict(zip(names, inputs, strict=True))).last_hidden_state

    torch.onnx.export(
        States().eval(),
        tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names),
        str(path),
        input_names=names,
        output_names=[states],
        dynamic_axes={name: {0: "texts", 1: "tokens"} for name in [*names, states]},
        dynamo=False,
    )


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
