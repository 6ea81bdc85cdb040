"""The queue in front of a collector: what is lost, and what is not."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from embedding_server.observability.outbox import Outbox

MOST = 4096


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


def test_the_oldest_go() -> None:
    """While one batch cannot be sent, so many wait, and more push out the oldest."""
    batches: list[Sequence[int]] = []
    going, done = threading.Event(), threading.Event()

    def send(batch: Sequence[int]) -> None:
        going.set()
        assert done.wait(10)
        batches.append(batch)

    outbox = Outbox("numbers", send)
    outbox.put(range(512))
    assert going.wait(10)
    outbox.put(range(512, 512 + MOST + 100))
    assert repr(outbox) == f"<Outbox numbers queued={MOST}>"
    done.set()
    outbox.close(5)
    kept = [number for batch in batches[1:] for number in batch]
    assert kept == list(range(612, 512 + MOST + 100))


def test_failures(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be sent costs its own batch, and is told of without what it said."""
    batches: list[Sequence[str]] = []

    def send(batch: Sequence[str]) -> None:
        if "bad" in batch:
            raise ValueError("a client's own words")
        batches.append(batch)

    logger = logging.getLogger("opentelemetry")
    logger.addHandler(caplog.handler)
    try:
        outbox = Outbox("words", send)
        outbox.put(["bad"] * 512)
        until(lambda: bool(caplog.messages))
        outbox.put(["good"])
        outbox.close(5)
    finally:
        logger.removeHandler(caplog.handler)
    assert batches == [["good"]]
    assert caplog.messages[0] == "words are not sent: ValueError"


def test_the_end_is_not_held_up() -> None:
    """Closing waits no longer than it is told to."""
    hung = threading.Event()
    outbox = Outbox("numbers", lambda _: hung.wait(10))
    outbox.put([1])
    started = time.monotonic()
    outbox.close(0.2)
    assert time.monotonic() - started < 1
    hung.set()
