"""The queue in front of a collector: what is lost, and what is not."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from embedding_server.observability.outbox import _QUEUED, Outbox


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_order_and_size() -> None:
    """All arrive, in order, in batches of at most 512; a full one does not wait."""
    batches: list[Sequence[int]] = []
    outbox, started = Outbox("numbers", batches.append), time.monotonic()
    for start in range(0, 1024, 8):
        outbox.put(range(start, start + 8))
    until(lambda: sum(map(len, batches)) == 1024)
    assert time.monotonic() - started < 0.9
    outbox.put([1024])
    outbox.close(5)
    assert [number for batch in batches for number in batch] == list(range(1025))
    assert max(map(len, batches)) == 512


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the outbox complains of."""
    found: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("opentelemetry.outbox")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_a_slow_collector_gets_full_batches() -> None:
    """What comes while a batch is sent waits for its second, unless it is a batch."""
    batches: list[Sequence[int]] = []

    def send(batch: Sequence[int]) -> None:
        batches.append(batch)
        time.sleep(0.02)

    outbox = Outbox("numbers", send)
    for number in range(1500):
        outbox.put([number])
        time.sleep(0.0005)
    outbox.close(5)
    assert sum(map(len, batches)) == 1500
    assert len(batches) <= 5


def test_the_oldest_go(said: list[str]) -> None:
    """While one batch cannot be sent, so many wait; more push out the oldest, and that is said."""
    batches: list[Sequence[int]] = []
    going, done = threading.Event(), threading.Event()

    def send(batch: Sequence[int]) -> None:
        going.set()
        assert done.wait(10)
        batches.append(batch)

    outbox = Outbox("numbers", send)
    outbox.put(range(512))
    assert going.wait(10)
    outbox.put(range(512, 512 + _QUEUED))
    assert said == []
    outbox.put(range(512 + _QUEUED, 512 + _QUEUED + 100))
    assert said == ["numbers are lost: too many wait to be sent"]
    assert repr(outbox) == f"<Outbox numbers queued={_QUEUED}>"
    done.set()
    outbox.close(5)
    kept = [number for batch in batches[1:] for number in batch]
    assert kept == list(range(612, 512 + _QUEUED + 100))


def test_failures(said: list[str]) -> None:
    """What cannot be sent costs its own batch, and is told of without what it said."""
    batches: list[Sequence[str]] = []

    def send(batch: Sequence[str]) -> None:
        if "bad" in batch:
            raise ValueError("a client's own words")
        batches.append(batch)

    outbox = Outbox("words", send)
    outbox.put(["bad"] * 512)
    until(lambda: bool(said))
    outbox.put(["good"])
    outbox.close(5)
    assert batches == [["good"]]
    assert said == ["words are not sent: ValueError"]


def test_the_end_is_not_held_up() -> None:
    """Closing waits no longer than it is told to."""
    hung = threading.Event()
    outbox = Outbox("numbers", lambda _: hung.wait(10))
    outbox.put([1])
    started = time.monotonic()
    outbox.close(0.2)
    assert time.monotonic() - started < 1
    hung.set()
