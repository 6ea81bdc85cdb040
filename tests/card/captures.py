"""A program for a card: captures graphs beside sessions that come, run and go, and checks rows."""

import itertools
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.convert import convert
from embedding_server.core import Ids, Precision
from embedding_server.runtime import captured
from embedding_server.runtime.calls import Calls
from embedding_server.runtime.captured import TEXTS
from embedding_server.runtime.memory import Nvml
from embedding_server.runtime.providers import CUDA
from embedding_server.runtime.session import OnnxSession
from tests.card.models import NUMBER

_CAPTURES, _MAX_TOKENS, _MIB = 5, 32, 1 << 20
_PROVIDERS = [(CUDA, {"device_id": "0", "enable_skip_layer_norm_strict_mode": "1"})]


def _session(graph: Path, calls: Calls, graph_tokens: int = 0) -> OnnxSession:
    half = Precision.FP16
    return OnnxSession(
        graph, 1, precision=half, providers=_PROVIDERS, calls=calls, graph_tokens=graph_tokens
    )


def used() -> int:
    """Bytes of the first card."""
    return Nvml(None).read()[0].used


def _texts(count: int, length: int) -> list[Ids]:
    return [np.ones(length, np.int64)] * count


def _main(model: Path, scratch: Path) -> None:
    graph = convert(read_directory(model, "m"), scratch, rounded=Precision.FP16, target="cuda")
    captured._GAIN = 0.0  # kernels that compute nothing take no time
    calls, done = Calls(), threading.Event()
    for graph_tokens in (0, _MAX_TOKENS):  # what CUDA and ONNX Runtime keep
        _session(graph, calls, graph_tokens).run(_texts(1, 3))
    before = used()

    def run() -> int:
        for count in itertools.count(1):
            # Sessions allocate, which a capture forbids.
            session = _session(graph, calls)
            session.run(_texts(8 * count, 16))
            with calls.shared():
                del session
            if done.is_set():
                return count
        raise AssertionError

    with ThreadPoolExecutor() as pool:
        beside = pool.submit(run)
        try:
            for _ in range(_CAPTURES):
                session = _session(graph, calls, _MAX_TOKENS)
                assert session._captured
                assert session._captured.sizes == [16, 32]
                for count in (1, TEXTS - 1, TEXTS):  # the last has no graph
                    rows = np.asarray(session.run(_texts(count, 3)))
                    assert len(rows) == count
                    assert rows == pytest.approx(NUMBER, rel=1e-3)
        finally:
            done.set()
        assert beside.result() > 1
    del session
    left = used() - before
    assert left < _MIB, left


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        _main(Path(sys.argv[1]), Path(directory))
