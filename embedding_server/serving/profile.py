"""What a model costs on this machine: measured when it is first loaded, then read from disk.

The schedule chooses batches by predicted time, so the prediction is measured, not assumed. Every
run corrects it further (`Batcher`).
"""

import itertools
import platform
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import structlog

from embedding_server.runtime.session import Session
from embedding_server.serving.schedule import Cost

_SHAPES = ((1, 8), (16, 16), (1, 64), (8, 64), (4, 128), (2, 256), (1, 512))
"""Texts and tokens of each; those over the model's limit are left out."""
_ROUNDS = 5
_TOKEN = 1
"""Any id does: time does not depend on it."""

log = structlog.get_logger()


def profile(session: Session, max_tokens: int, seconds: float, path: Path) -> Cost:
    """The model's cost, from `path`, or measured for so many seconds at most and stored there.

    0 seconds measure nothing and give the default cost.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cost)
    except (OSError, msgspec.MsgspecError):
        pass
    if not seconds:
        return Cost()
    cost = measure(session, max_tokens, seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(msgspec.json.encode(cost))
    Path(scratch.name).rename(path)
    log.info("model.profiled", **msgspec.structs.asdict(cost))
    return cost


def measure(session: Session, max_tokens: int, seconds: float) -> Cost:
    """Time runs of several shapes and fit the cost by least relative squares."""
    deadline = time.monotonic() + seconds
    shapes = [shape for shape in _SHAPES if shape[1] <= max_tokens] or [(1, max_tokens)]
    best = dict.fromkeys(shapes, np.inf)
    for texts, length in itertools.chain.from_iterable(itertools.repeat(shapes, _ROUNDS)):
        batch = [np.full(length, _TOKEN, np.int64)] * texts
        started = time.perf_counter()
        session.run(batch)
        best[texts, length] = min(best[texts, length], time.perf_counter() - started)
        if time.monotonic() > deadline:
            break
    return fit({shape: value for shape, value in best.items() if np.isfinite(value)})


def fit(measured: dict[tuple[int, int], float]) -> Cost:
    """The cost that fits (texts, length) -> seconds best; no part of it is negative."""
    rows = [(1, texts * length, texts * length**2) for texts, length in measured]
    seconds = np.array(list(measured.values()))
    scaled = np.array(rows) / seconds[:, None]
    used = [0, 1, 2]
    while True:
        solution = np.linalg.lstsq(scaled[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (solution >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(solution)))
    parts = dict(zip(used, map(float, solution), strict=True))
    return Cost(*(max(0.0, parts.get(index, 0.0)) for index in range(3)))


def device_name() -> str:
    """The processor, as far as the platform tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
