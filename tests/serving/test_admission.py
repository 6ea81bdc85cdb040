"""The gate: limits, order, refusals, cancellation."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_server.errors import ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.serving import forecast
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.cost import Work
from embedding_server.serving.forecast import Drain, Promises
from embedding_server.serving.schedule import Lane

EMPTY = "AdmissionQueue(inside=0, waiting=0, work=0.000)"


def gate(**changes: Any) -> AdmissionQueue:
    """A queue of one request inside and two in line, before a device of one slot."""
    options: dict[str, Any] = {"max_requests": 1, "max_depth": 2, "timeout": 5.0, "cores": 1}
    return AdmissionQueue(**(options | changes), max_batches=10.0, metrics=Metrics("test"))


def work(seconds: float) -> Work:
    """A batch takes a second."""
    return Work(seconds, seconds)


class Holder:
    """A request that holds a permit until told to finish."""

    def __init__(
        self,
        queue: AdmissionQueue,
        seconds: float = 1.0,
        lane: Lane = Lane.BULK,
        client: str = "one",
    ) -> None:
        self.inside = False
        self._finish = asyncio.Event()
        self.task = asyncio.create_task(self._run(queue, seconds, lane, client))

    async def _run(self, queue: AdmissionQueue, seconds: float, lane: Lane, client: str) -> None:
        with await queue.permit(work(seconds), lane, client):
            self.inside = True
            await self._finish.wait()

    async def finish(self) -> None:
        """Give the permit back."""
        self._finish.set()
        await self.task


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_first_come_first_served() -> None:
    """Places go to those in line in the order they came."""
    queue = gate()
    holders = [Holder(queue) for _ in range(3)]
    await settle()
    assert [one.inside for one in holders] == [True, False, False]
    assert queue.depth == 2
    await holders[0].finish()
    await settle()
    assert [one.inside for one in holders[1:]] == [True, False]
    await holders[1].finish()
    await holders[2].finish()
    assert repr(queue) == EMPTY


async def test_full_line_refuses_at_once() -> None:
    """One more than the line holds is a 503 with a time to come back."""
    queue = gate(timeout=60.0)
    holders = [Holder(queue, 20.0), Holder(queue, 2.0), Holder(queue, 2.0)]
    await settle()
    with (
        pytest.raises(ServiceUnavailable) as refusal,
        await queue.permit(work(1), Lane.BULK, "one"),
    ):
        pass
    assert refusal.value.reason == "queue_full"
    assert 24.0 <= refusal.value.retry_after <= 30.0
    for holder in holders:
        await holder.finish()
    assert repr(queue) == EMPTY


async def test_wait_ends_with_503() -> None:
    """Who waits longer than the timeout is refused, and the line forgets them."""
    queue = gate(timeout=0.01)
    holder = Holder(queue, 0.001)
    await settle()
    with pytest.raises(ServiceUnavailable, match="no place became free") as refusal:
        await queue.permit(work(1), Lane.BULK, "one")
    assert refusal.value.reason == "queue_timeout"
    await holder.finish()
    assert repr(queue) == EMPTY


async def test_hopeless_wait_is_refused_at_once() -> None:
    """A request whose predicted wait exceeds the timeout does not wait for it."""
    queue = gate()
    holders = [Holder(queue), Holder(queue, 100.0)]
    await settle()
    with (
        pytest.raises(ServiceUnavailable) as refusal,
        await queue.permit(work(1), Lane.BULK, "one"),
    ):
        pass
    assert refusal.value.reason == "wait_too_long"
    for holder in holders:
        await holder.finish()


async def test_limit_by_work() -> None:
    """Without a limit of requests, work decides, and one request of any size fits."""
    queue = gate(max_requests=None)
    holders = [Holder(queue, work) for work in (6.0, 6.0, 6.0)]
    await settle()
    assert [one.inside for one in holders] == [True, True, False]
    assert queue.permits == 0
    for holder in holders:
        await holder.finish()
    huge = Holder(queue, 1e9)
    await settle()
    assert huge.inside
    await huge.finish()
    assert repr(queue) == EMPTY


async def test_cancelled_while_waiting() -> None:
    """A client that leaves the line frees its place, whatever it was doing."""
    queue = gate()
    first, gone, last = Holder(queue), Holder(queue), Holder(queue)
    await settle()
    gone.task.cancel()
    await settle()
    assert queue.depth == 1
    await first.finish()
    await settle()
    assert last.inside
    await last.finish()
    assert repr(queue) == EMPTY


async def test_cancelled_at_the_moment_of_admission() -> None:
    """A place granted to somebody who leaves at that very moment goes to the next."""
    queue = gate()
    first, gone, last = Holder(queue), Holder(queue), Holder(queue)
    await settle()
    first._finish.set()
    await asyncio.sleep(0)  # the place is granted, its waiter has not run yet
    gone.task.cancel()
    await settle()
    assert last.inside
    await last.finish()
    assert repr(queue) == EMPTY


async def test_draining_refuses() -> None:
    """A draining server takes nobody in, and lets those inside finish."""
    queue = gate()
    holder = Holder(queue)
    await settle()
    queue.draining = True
    with pytest.raises(ServiceUnavailable, match="shutting down"):
        await queue.permit(work(1), Lane.BULK, "one")
    await holder.finish()
    assert repr(queue) == EMPTY


async def test_bulk_does_not_keep_small_requests_out() -> None:
    """Small requests are admitted beside bulk that waits, up to a limit of their own."""
    queue = gate(max_requests=None, max_depth=9)
    bulk = [Holder(queue, 12.0) for _ in range(2)]
    small = [Holder(queue, 6.0, Lane.INTERACTIVE) for _ in range(3)]
    await settle()
    assert [one.inside for one in bulk] == [True, False]
    assert [one.inside for one in small] == [True, True, False]
    for holder in bulk + small:
        await holder.finish()
    assert repr(queue) == EMPTY


async def test_clients_take_turns() -> None:
    """One client's line does not keep another's requests waiting behind all of it."""
    queue = gate(max_depth=9, timeout=60.0)
    flood = [Holder(queue) for _ in range(5)]
    await settle()
    polite = [Holder(queue, client="two") for _ in range(2)]
    await settle()
    order = []
    for _ in range(6):
        (inside,) = (one for one in flood + polite if one.inside and not one.task.done())
        order.append("two" if inside in polite else "one")
        await inside.finish()
        await settle()
    assert order == ["one", "one", "two", "one", "two", "one"]
    await flood[-1].finish()
    assert repr(queue) == EMPTY


async def test_a_crowder_makes_room() -> None:
    """In a full line the last request of whoever has most there gives way, with a 503."""
    queue = gate(max_depth=3, timeout=60.0)
    flood = [Holder(queue) for _ in range(4)]
    await settle()
    polite = Holder(queue, client="two")
    await settle()
    with pytest.raises(ServiceUnavailable) as refusal:
        await flood[3].task
    assert refusal.value.reason == "queue_full"
    assert queue.depth == 3
    with pytest.raises(ServiceUnavailable):
        await queue.permit(work(1), Lane.BULK, "one")
    assert queue.refused([Lane.BULK], "one")
    assert queue.refused([Lane.BULK], "three") is None
    for holder in (flood[0], flood[1], polite, flood[2]):
        await holder.finish()
    assert repr(queue) == EMPTY


async def test_who_is_told_to_come_back_is_expected() -> None:
    """Refused work comes back one after the other, not all at once."""
    queue = gate(max_depth=0)
    holder = Holder(queue, 2.0)
    await settle()
    times = []
    for _ in range(5):
        with pytest.raises(ServiceUnavailable) as refusal:
            await queue.permit(work(3), Lane.BULK, "one")
        times.append(refusal.value.retry_after)
    assert all(later > earlier for earlier, later in itertools.pairwise(times))
    assert times[-1] >= 2.0 + 4 * 3.0
    await holder.finish()


async def test_permits_are_corrected() -> None:
    """What a request turns out to cost decides who may come in after it."""
    queue = gate(max_requests=None, max_depth=9)
    with await queue.permit(work(1), Lane.BULK, "one") as permit:
        assert queue.permits > 0
        permit.correct(work(12))
        assert queue.permits == 0
        assert repr(queue) == "AdmissionQueue(inside=1, waiting=0, work=12.000)"
        waiting = Holder(queue)
        await settle()
        assert not waiting.inside
        permit.correct(work(2))
        await settle()
        assert waiting.inside
        await waiting.finish()
    assert repr(queue) == EMPTY


async def test_wait_is_predicted_by_client() -> None:
    """A client with nothing in line waits for a turn, not for the whole line of another."""
    queue = gate(max_depth=9, timeout=100.0)
    holders = [Holder(queue, 10.0) for _ in range(4)]
    await settle()
    gate_ = queue._gate(Lane.BULK)
    assert queue._wait_of(gate_, "one", work(5)) == pytest.approx(1.1 * (10 + 30))
    assert queue._wait_of(gate_, "two", work(5)) == pytest.approx(1.1 * (10 + 5))
    for holder in holders:
        await holder.finish()
    assert queue.estimated_wait("two") == 0


def test_drain_follows_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is the prior at first, then what left per second lately."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: clock.now))
    drain = Drain(2.0)
    assert drain.rate == 2.0
    for _ in range(50):  # each began long before somebody waited
        drain.begin()
        clock.now += 0.1
        drain.left(1.0)
    assert drain.rate == 2.0
    for _ in range(200):
        clock.now += 0.1
        drain.left(0.3)
    assert drain.rate == pytest.approx(3.0, rel=0.01)
    promises = Promises()
    promises.add(4.0, 10.0)
    assert promises.work == 4.0
    clock.now += 20
    assert promises.work == 0


async def test_predictions_are_judged() -> None:
    """How long requests waited by what was predicted for them is a metric."""
    metrics = Metrics("test")
    queue = AdmissionQueue(
        max_requests=1, max_batches=1.0, max_depth=9, timeout=5.0, cores=1, metrics=metrics
    )
    first, second = Holder(queue, 0.05), Holder(queue, 0.05)
    await settle()
    await asyncio.sleep(0.05)
    await first.finish()
    await settle()
    await second.finish()
    text = metrics.render("")[0].decode()
    assert "inference_queue_wait_ratio_count 1.0" in text
    assert 'inference_queue_wait_ratio_bucket{le="0.75"} 0.0' in text


async def test_jitter_within_the_bounds() -> None:
    """However short or long the wait, clients are spread, between 1 and 60 seconds."""
    for seconds in (0.001, 1e6):
        queue = gate(max_depth=0)
        holder = Holder(queue, seconds)
        await settle()
        refusals = [queue.refusal("test", "test").retry_after for _ in range(20)]
        assert len(set(refusals)) > 10
        assert all(1 <= after <= 60 for after in refusals)
        await holder.finish()
