"""Our packed graph against the padded one that exporters write: same weights, same texts."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.peers import padded_graph
from embedding_server.runtime.session import Session

_BATCHES = {
    "16 texts of 16 tokens": [16] * 16,
    "8 texts of 64 tokens": [64] * 8,
    "1 text of 256 tokens": [256],
    "1 text of 512 tokens": [512],
    "16 texts of 8 to 68 tokens": list(range(8, 72, 4)),
}
_ROUNDS = 15


def speedups(session: Session, directory: Path) -> dict[str, float]:
    """How many times as fast our graph is, on one thread, by medians of interleaved runs."""
    with tempfile.TemporaryDirectory() as scratch:
        padded_graph(directory, Path(scratch, "model.onnx"))
        return compare(session, Path(scratch, "model.onnx"))


def compare(session: Session, padded: Path) -> dict[str, float]:
    """The same against any graph with the inputs and the first output of an exported BERT."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    other = ort.InferenceSession(padded, options, providers=["CPUExecutionProvider"])
    names = {one.name for one in other.get_inputs()}
    result = {}
    for name, lengths in _BATCHES.items():
        texts = [np.random.default_rng(0).integers(1000, 20_000, length) for length in lengths]
        ids = np.zeros((len(texts), max(lengths)), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds = {key: value for key, value in feeds.items() if key in names}
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_ROUNDS):
            times[0].append(_time(partial(session.run, texts)))
            times[1].append(_time(partial(other.run, None, feeds)))
        result[name] = statistics.median(times[1]) / statistics.median(times[0])
    return result


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
