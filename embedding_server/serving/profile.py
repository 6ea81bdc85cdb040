"""What is known of a model on this machine: measured when it is first loaded, then read from disk.

The schedule chooses batches by predicted time, so the prediction is measured, not assumed. Every
run corrects it further (`Batcher`).
"""

import itertools
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import structlog

from embedding_server.runtime.errors import OutOfMemoryError
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Session
from embedding_server.serving.cost import Cost, Shape
from embedding_server.serving.tuning import Way, beside_load

_BATCHES: tuple[tuple[int, ...], ...] = (
    (60, 64),
    (8,),
    (16,) * 15 + (24,),
    (20, 40, 60, 250),
    (8, 16, 24, 32),
    (32, 48, 64, 80, 96),
    (64,) * 7 + (72,),
    (100, 110, 120, 128),
    (10,) * 15 + (250,),
    (500,),
)
"""Lengths of texts, mixed as they come; batches over the model's limit are left out."""
_ROUNDS, _TIMES_ON_GPU = 5, 16
"""How often everything is run, and how much larger batches are on a GPU."""

log = structlog.get_logger()


class Quality(msgspec.Struct, frozen=True):
    """A reduced precision against fp32: least cosine over built-in texts, and times as fast."""

    cosine: float
    speed: float


class Profile(msgspec.Struct, frozen=True):
    """A model on this machine, measured in `seconds`; `quality` is None in fp32.

    `model` is for people who look at the file.
    """

    cost: Cost
    way: Way
    seconds: float
    quality: Quality | None = None
    model: str = ""


def stored(path: Path) -> Profile | None:
    """The profile in `path`; None where there is none that can be used."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.MsgspecError):
        return None


def store(profile: Profile, path: Path) -> None:
    """Write a profile."""
    save(msgspec.json.encode(profile), path)


def save(content: bytes, path: Path) -> None:
    """Write what is known, in one step; where that is impossible it is found again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(content)
        scratch.rename(path)
    except OSError as exc:
        log.warning("cache.unsaved", error=str(exc))


def measure(
    session: Session,
    max_tokens: int,
    seconds: float,
    cores: int,
    quiet: Callable[[], bool] = lambda: True,
) -> Cost:
    """Time runs of several batches and fit the cost by least relative squares.

    They run beside a busy event loop and, on all other cores, the same model. It takes so many
    seconds, or one run where that is longer, and ends where `quiet` does; 0 seconds give the
    default cost.
    """
    if not seconds:
        return Cost(padded=session.padded)
    deadline = time.monotonic() + seconds
    batches = [batch for batch in _BATCHES if max(batch) <= max_tokens] or [(max_tokens,)]
    times = 1 if session.provider == CPU else _TIMES_ON_GPU
    best: dict[tuple[int, ...], float] = {}
    with beside_load(session, cores // session.threads.per_run - 1, max_tokens):
        for batch in itertools.chain.from_iterable(itertools.repeat(batches, _ROUNDS)):
            items = [session.sample(length) for length in batch] * times
            key = tuple(map(len, items))
            started = time.perf_counter()
            with suppress(OutOfMemoryError):
                session.run(items)
                best[key] = min(best.get(key, np.inf), time.perf_counter() - started)
            if time.monotonic() > deadline or not quiet():
                break
    return fit(best, padded=session.padded) if best else Cost(padded=session.padded)


def fit(measured: Mapping[tuple[int, ...], float], *, padded: bool) -> Cost:
    """The cost that fits lengths of a batch -> seconds best; no part of it is negative.

    Of few batches it takes few parts: time per token first, then the run's own, then the texts'.
    """
    shapes = [Shape.of(batch) for batch in measured]
    if padded:
        shapes = [shape.padded() for shape in shapes]
    rows = [(1, shape.texts, shape.tokens, shape.pairs) for shape in shapes]
    seconds = np.array(list(measured.values()))
    scaled = np.array(rows) / seconds[:, None]
    used = [2, 0, 1, 3][: len(measured)]
    while True:
        solution = np.linalg.lstsq(scaled[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (solution >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(solution)))
    parts = dict(zip(used, map(float, solution), strict=True))
    run, text, token, pair = (max(0.0, parts.get(index, 0.0)) for index in range(4))
    return Cost(run, text, token, pair, padded)


def device_name() -> str:
    """The processor, as far as the platform tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
