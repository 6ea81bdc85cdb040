"""How a model is run best: threads per run and tokens per batch, measured beside a busy event loop.

Measured on an idle machine, one run on all cores often looks best; beside an event loop that needs
its share of them it is not. So all cores are kept busy while a thread takes Python's lock as often
as a loaded event loop does, and the default is left only for a gain that is clear twice.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from embedding_server.core import Item
from embedding_server.runtime.errors import OutOfMemoryError
from embedding_server.runtime.session import Session, Spinning, Threads

Open = Callable[[Threads], Session]
"""Opens the model's session with so many threads per run."""

_LENGTHS = (12, 90, 18, 64, 24, 48, 32, 128)
_SIZES, _GPU_SIZES = (256, 512, 1024), (8192, 2048, 32768)
"""Tokens per batch, the default first; those for GPUs are not measured yet."""
_LONG_SIZES, _LONG_GPU_SIZES = (128, 256, 512, 1024, 2048), (1024, 2048, 4096, 8192, 16384, 32768)
_LOOP_EVERY_SECONDS, _LOOP_BUSY_SECONDS = 3e-3, 3e-4
"""The event loop under single texts took 7 to 14 % of a core."""
_GAIN = 1.1


class Way(msgspec.Struct, frozen=True):
    """How a model is run."""

    threads: Threads = Threads()
    batch_tokens: int = _SIZES[0]


class Point(msgspec.Struct, frozen=True):
    """What a way to run a model carries, and how long one batch takes."""

    way: Way
    tokens_per_second: float
    run_seconds: float


def ways(cores: int, fixed: Threads | None, *, on_cpu: bool = True) -> list[Way]:
    """What is tried at a first load, the default first; larger batches with its threads only."""
    first, *others = _threads(cores, fixed, [Spinning.NEVER])
    sizes = _SIZES if on_cpu else _GPU_SIZES
    return [Way(first, tokens) for tokens in sizes] + [Way(threads) for threads in others]


def all_ways(cores: int, fixed: Threads | None, *, on_cpu: bool = True) -> list[Way]:
    """Everything there is to try, the default first."""
    first, *others = _threads(cores, fixed, [Spinning.NEVER, Spinning.ALWAYS])
    sizes = _LONG_SIZES if on_cpu else _LONG_GPU_SIZES
    tried = [Way(threads, tokens) for threads in (first, *others) for tokens in sizes]
    default, *_ = ways(cores, fixed, on_cpu=on_cpu)
    return sorted(tried, key=lambda way: way != default)


def _threads(cores: int, fixed: Threads | None, spinning: Sequence[Spinning]) -> list[Threads]:
    if fixed or cores == 1:
        return [fixed or Threads()]
    divided = [Threads(count) for count in range(1, cores + 1) if cores % count == 0]
    return divided + [Threads(cores, how) for how in spinning]


def best_way(
    open_session: Open,
    candidates: Sequence[Way],
    cores: int,
    max_tokens: int,
    *,
    seconds: float,
    quiet: Callable[[], bool] = lambda: True,
) -> Way:
    """The first candidate, or one that is clearly faster, measured twice.

    It takes so many seconds, and to open the sessions, one at a time; what does not fit into them
    is not tried. Where `quiet` ends it is the first.
    """
    deadline, share = time.monotonic() + seconds, seconds / (len(candidates) + 2)
    points = []
    for point in sweep(open_session, candidates, cores, max_tokens, share):
        points.append(point)
        if not quiet():
            return candidates[0]
        if time.monotonic() >= deadline:
            break
    if not points:
        return min(candidates, key=lambda way: way.batch_tokens)
    return settle(open_session, points, cores, max_tokens, share)


def settle(
    open_session: Open, points: Sequence[Point], cores: int, max_tokens: int, seconds: float
) -> Way:
    """The way of the first point, or one that is clearly faster, then and measured once more.

    `ALWAYS` is no choice: with several models, their threads would take cores from one another.
    """

    def again(point: Point) -> Point:
        return measure(open_session(point.way.threads), point.way, cores, max_tokens, seconds)

    default = points[0]
    allowed = [point for point in points if point.way.threads.spinning is not Spinning.ALWAYS]
    best = max(allowed, key=_speed)
    clear = _speed(best) > _GAIN * _speed(default)
    return (
        best.way if clear and _speed(again(best)) > _GAIN * _speed(again(default)) else default.way
    )


def _speed(point: Point) -> float:
    return point.tokens_per_second


def sweep(
    open_session: Open, candidates: Sequence[Way], cores: int, max_tokens: int, seconds: float
) -> Iterator[Point]:
    """Every candidate, so many seconds each."""
    for threads, group in itertools.groupby(candidates, lambda way: way.threads):
        session = open_session(threads)
        for way in group:
            try:
                point = measure(session, way, cores, max_tokens, seconds)
            except OutOfMemoryError:
                continue  # it is no choice
            yield point
        del session  # before the next one is opened


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points than which none is both faster and quicker to finish a batch, quickest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.run_seconds, -one.tokens_per_second)):
        if not best or point.tokens_per_second > best[-1].tokens_per_second:
            best.append(point)
    return best


def measure(session: Session, way: Way, cores: int, max_tokens: int, seconds: float) -> Point:
    """Keep all cores busy for so long, beside a busy event loop; one run each at least."""
    slots, texts = cores // way.threads.per_run, batch(session, way.batch_tokens, max_tokens)
    tokens = sum(map(len, texts))
    session.run(texts)
    with beside_load(session, 0, max_tokens), ThreadPoolExecutor(slots) as pool:
        started = time.perf_counter()

        def work(_: int) -> tuple[int, float]:
            runs, elapsed = 0, 0.0
            while not runs or elapsed < seconds:
                session.run(texts)
                runs, elapsed = runs + 1, time.perf_counter() - started
            return runs, elapsed

        done = list(pool.map(work, range(slots)))
    return Point(
        way=way,
        tokens_per_second=sum(runs * tokens / elapsed for runs, elapsed in done),
        run_seconds=sum(elapsed for _, elapsed in done) / sum(runs for runs, _ in done),
    )


def batch(session: Session, tokens: int, max_tokens: int) -> list[Item]:
    """Inputs of mixed lengths, at most `max_tokens` each, of about so many tokens together."""
    items: list[Item] = []
    for length in itertools.cycle(_LENGTHS):
        items.append(session.sample(min(length, max_tokens, tokens)))
        tokens -= len(items[-1])
        if tokens <= 0:
            break
    return items


@contextmanager
def beside_load(session: Session, slots: int, max_tokens: int) -> Iterator[None]:
    """Load as a busy server has it: an event loop at work, and so many slots that run batches."""
    done, texts = threading.Event(), batch(session, _SIZES[0], max_tokens)

    def loop() -> None:
        while not done.wait(_LOOP_EVERY_SECONDS):
            end = time.perf_counter() + _LOOP_BUSY_SECONDS
            while time.perf_counter() < end:
                pass

    def slot() -> None:
        while not done.is_set():
            session.run(texts)

    work = [loop] + [slot] * slots
    threads = [threading.Thread(target=one, name="synthetic-load", daemon=True) for one in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
