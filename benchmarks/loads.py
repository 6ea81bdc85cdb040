"""Our server under load, beside the limit: shares of what the bare session does at that moment.

A shared machine changes its speed within seconds. So every load runs between two measurements of
the limit, several times over, and its share is the median of these rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

from benchmarks.load import Driven, bodies, drive
from benchmarks.server import tokens_served

ROUNDS, SECONDS, WARM_UP_SECONDS = 3, 6.0, 2.0
_CLIENT = "openai client, 32 x 4 threads"
_SHAPES = {
    "1 text x 1 connection": (1, 1),
    "1 text x 32 connections": (1, 32),
    "1 text x 64 connections": (1, 64),
    "32 texts x 4 connections": (32, 4),
    "128 texts x 2 connections": (128, 2),
}

Load = Callable[[float], Driven]
"""Drives a server for so many seconds."""

Beside = Callable[[Callable[[], float]], tuple[float, float]]
"""What a measurement gives, and its share of the limit around it."""


def loads(url: str, model: str, texts: Sequence[str]) -> dict[str, Load]:
    """The loads of the benchmark; the client of OpenAI's where it is installed."""
    found: dict[str, Load] = {
        name: partial(drive, f"{url}/api/embed", bodies(model, texts, per_request), connections)
        for name, (per_request, connections) in _SHAPES.items()
    }
    if find_spec("openai"):
        found[_CLIENT] = partial(_openai, url, model, texts)
    return found


def in_flight(name: str) -> int:
    """How many texts a load keeps in flight."""
    per_request, connections = _SHAPES.get(name, (32, 4))
    return per_request * connections


def shares(
    url: str, loads: Mapping[str, Load], beside_limit: Beside
) -> dict[str, tuple[float, float]]:
    """Load -> the medians of its tokens per second, and of its share of the limit around it."""
    for load in loads.values():
        load(WARM_UP_SECONDS)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
    for _ in range(ROUNDS):
        for name, load in loads.items():
            speeds[name].append(beside_limit(partial(tokens_per_second, url, load)))
    return {
        name: (
            statistics.median(speed for speed, _ in found),
            statistics.median(share for _, share in found),
        )
        for name, found in speeds.items()
    }


class BesideLimit:
    """Measures between two measurements of the limit; the second is the next one's first."""

    def __init__(self, limit: Callable[[], float]) -> None:
        self._limit = limit
        self._before = limit()

    def __call__(self, measure: Callable[[], float]) -> tuple[float, float]:
        """What `measure` gives, and its share of the limit around it."""
        speed, after = measure(), self._limit()
        share, self._before = 2 * speed / (self._before + after), after
        return speed, share


def tokens_per_second(url: str, load: Load, seconds: float = SECONDS) -> float:
    """Real tokens per second under a load."""
    start = tokens_served(url)
    seconds = load(seconds).seconds
    return (tokens_served(url) - start) / seconds


def _openai(url: str, model: str, texts: Sequence[str], seconds: float) -> Driven:
    """The client as people use it: base64, its default headers, four threads."""
    from openai import OpenAI  # noqa: PLC0415 - may be absent, takes a second

    groups = [list(texts[at : at + 32]) for at in range(0, len(texts), 32)]
    started = time.perf_counter()

    def work(number: int) -> int:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answered = 0
        while time.perf_counter() - started < seconds:
            group = groups[(number + 4 * answered) % len(groups)]
            client.embeddings.create(model=model, input=group)
            answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        answered = sum(pool.map(work, range(4)))
    return Driven(answered, time.perf_counter() - started)
