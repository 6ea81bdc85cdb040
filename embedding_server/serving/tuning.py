"""How many threads a run gets: measured as the model will run, beside a busy event loop.

Measured on an idle machine, one run on all cores often looks best; beside an event loop that needs
its share of them it is not. So all run slots are kept busy while a thread takes Python's lock as
often as a loaded event loop does, and the default is left only for a clear gain.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec
import numpy as np

from embedding_server.core import Ids
from embedding_server.runtime.session import PackedSession, Session, Spinning, Threads

Open = Callable[[Threads], PackedSession]
"""Opens the model's session with so many threads per run."""

_LENGTHS = (12, 90, 18, 64, 24, 48, 32, 128)
_TOKENS = sum(_LENGTHS)
_BATCHES = (128, 256, 512, 1024, 2048)
_LOOP_EVERY_SECONDS, _LOOP_BUSY_SECONDS = 3e-3, 3e-4
"""The event loop under single texts took 7 to 14 % of a core."""
_GAIN = 1.1


class Point(msgspec.Struct, frozen=True):
    """One way to run a model: what it carries, and how long a batch takes."""

    threads: Threads
    batch_tokens: int
    tokens_per_second: float
    run_seconds: float


def batch(tokens: int, max_tokens: int) -> list[Ids]:
    """Texts of mixed lengths, at most `max_tokens` each, of so many tokens together."""
    texts: list[Ids] = []
    for length in itertools.cycle(_LENGTHS):
        texts.append(np.ones(min(length, max_tokens, tokens), np.int64))
        tokens -= len(texts[-1])
        if not tokens:
            return texts
    raise AssertionError


def candidates(cores: int) -> list[Threads]:
    """Ways to use the cores, the default first."""
    if cores == 1:
        return [Threads()]
    divided = [Threads(count) for count in range(1, cores + 1) if cores % count == 0]
    return [*divided, Threads(cores, Spinning.NEVER), Threads(cores, Spinning.ALWAYS)]


def best_threads(
    opened: PackedSession, open_session: Open, cores: int, max_tokens: int, seconds: float
) -> PackedSession:
    """The session to serve with: `opened`, or one with other threads that is clearly faster.

    It measures for so many seconds, one run at least; what does not fit into them is not tried.
    """
    ways = candidates(cores)
    deadline, share = time.monotonic() + seconds, seconds / len(ways)
    texts = batch(_TOKENS, max_tokens)
    speeds = {opened.threads: measure(opened, cores, texts, share).tokens_per_second}
    for threads in ways:
        if threads not in speeds and time.monotonic() < deadline:
            session = open_session(threads)
            speeds[threads] = measure(session, cores, texts, share).tokens_per_second
    chosen = choose(speeds)
    return opened if chosen == opened.threads else open_session(chosen)


def choose(speeds: Mapping[Threads, float]) -> Threads:
    """The fastest of them where that is a clear gain, else the first."""
    default = next(iter(speeds))
    fastest = max(speeds, key=lambda threads: speeds[threads])
    return fastest if speeds[fastest] > _GAIN * speeds[default] else default


def sweep(open_session: Open, cores: int, max_tokens: int, seconds: float) -> Iterator[Point]:
    """Every way to use the cores with every size of batch, so many seconds each."""
    for threads in candidates(cores):
        session = open_session(threads)
        for tokens in _BATCHES:
            yield measure(session, cores, batch(tokens, max_tokens), seconds)


def steps(cores: int) -> int:
    """How many points `sweep` gives."""
    return len(candidates(cores)) * len(_BATCHES)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points than which none is both faster and quicker to finish a batch, quickest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.run_seconds, -one.tokens_per_second)):
        if not best or point.tokens_per_second > best[-1].tokens_per_second:
            best.append(point)
    return best


def measure(session: Session, cores: int, texts: Sequence[Ids], seconds: float) -> Point:
    """Keep all run slots busy for so long, beside a busy event loop."""
    slots = max(1, cores // session.threads.per_run)
    tokens = sum(map(len, texts))
    session.run(texts)
    with _event_loop(), ThreadPoolExecutor(slots) as pool:
        started = time.perf_counter()

        def work(_: int) -> tuple[int, float]:
            for runs in itertools.count(1):
                session.run(texts)
                elapsed = time.perf_counter() - started
                if elapsed >= seconds:
                    return runs, elapsed
            raise AssertionError

        done = list(pool.map(work, range(slots)))
    return Point(
        threads=session.threads,
        batch_tokens=tokens,
        tokens_per_second=sum(runs * tokens / elapsed for runs, elapsed in done),
        run_seconds=sum(elapsed for _, elapsed in done) / sum(runs for runs, _ in done),
    )


@contextmanager
def _event_loop() -> Iterator[None]:
    """A thread that does as a loaded event loop does."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(_LOOP_EVERY_SECONDS):
            end = time.perf_counter() + _LOOP_BUSY_SECONDS
            while time.perf_counter() < end:
                pass

    thread = threading.Thread(target=work, name="synthetic-load", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
