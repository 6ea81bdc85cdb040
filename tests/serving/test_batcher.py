"""Batcher and device with a fake session: order, sharing, failures, cancellation."""

import asyncio
import weakref
from itertools import chain
from typing import Any

import numpy as np
import pytest

from embedding_server.core import Rows
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.errors import DeviceLostError
from embedding_server.serving import device as module
from embedding_server.serving.batcher import Batcher, RunError
from embedding_server.serving.cost import Shape
from embedding_server.serving.device import Device, Run
from tests.fakes import MEMORY, FakeSession, batcher, ids


async def started(session: FakeSession) -> None:
    """Wait until one more run has started."""
    assert await asyncio.to_thread(session.running.acquire, timeout=10)


async def test_rows_come_back_in_order(device: Device) -> None:
    """A request larger than a batch is spread over several and put together again."""
    session = FakeSession()
    lengths = [40, 3, 17, 60, 90, 5, 5]
    rows = await batcher(device, session).embed(
        [ids(length, index) for index, length in enumerate(lengths)]
    )
    assert np.stack(rows)[:, 0].tolist() == lengths
    assert np.stack(rows)[:, 1].tolist() == list(range(len(lengths)))
    assert sorted(chain(*session.batches)) == sorted(lengths)
    assert len(session.batches) > 1


async def test_requests_share_a_batch(device: Device) -> None:
    """Texts that wait while a run is on go together, whoever sent them."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    others = [asyncio.create_task(line.embed([ids(length)])) for length in (4, 5, 6)]
    await asyncio.sleep(0)
    session.release()
    await asyncio.gather(first, *others)
    assert session.batches == [[9], [4, 5, 6]]


async def test_one_bad_text_fails_alone(device: Device) -> None:
    """A failing batch is split until the culprit is alone; everybody else gets their rows."""
    session = FakeSession(poison=999)
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    good = [asyncio.create_task(line.embed([ids(length)])) for length in (4, 5, 6, 7)]
    bad = asyncio.create_task(line.embed([ids(5), ids(5, first=997)]))
    await asyncio.sleep(0)
    session.release()
    with pytest.raises(RunError):
        await bad
    assert [(await task)[0][0] for task in (first, *good)] == [9, 4, 5, 6, 7]
    assert repr(device) == "Device(cores=1, running=0, Schedule(interactive=0, bulk=0))"


async def test_retries_are_counted() -> None:
    """A failed batch of two requests is two more runs, each of which the metrics count."""
    metrics = Metrics("test")
    device = Device(1, 64, MEMORY, metrics)
    device.start()
    session = FakeSession(poison=999)
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    good = asyncio.create_task(line.embed([ids(5)]))
    bad = asyncio.create_task(line.embed([ids(5, first=997)]))
    await asyncio.sleep(0)
    session.release()
    with pytest.raises(RunError):
        await bad
    await asyncio.gather(first, good)
    assert metrics.total(metrics.run_retries) == 2
    device.stop()


@pytest.mark.parametrize("texts", [1, 5])
async def test_non_finite_rows_are_failures_of_their_own(device: Device, texts: int) -> None:
    """A text whose row is not finite is run again alone, and then is an error of its request."""
    session = FakeSession(nan=999)
    line = batcher(device, session)
    others = [asyncio.create_task(line.embed([ids(8)])) for _ in range(texts - 1)]
    with pytest.raises(RunError):
        await line.embed([ids(8, first=995)])
    for other in others:
        assert np.isfinite(await other).all()


async def test_rows_are_made_finite_in_fp32(device: Device) -> None:
    """Texts that a reduced precision cannot express run again in fp32, opened once for all."""
    session, opened = FakeSession(nan=999), [FakeSession()]
    line = batcher(device, session, exact=opened.pop)
    rows = [await line.embed([ids(8), ids(8, first=995), ids(8)]) for _ in range(2)]
    assert [row[1] for row in np.concatenate(rows).tolist()] == [0, 995, 0] * 2
    await asyncio.sleep(0)  # counted once the rows are out
    assert line._metrics.total(line._metrics.run_fallbacks) == 2
    assert line.exact().batches == [[8], [8]]  # type: ignore[attr-defined]


async def test_hung_run_is_seen_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over the watchdog's limit is a problem of the device, and is ended."""
    monkeypatch.setattr(module, "_WATCHDOG_SECONDS", 0.0)
    monkeypatch.setattr(module, "_WATCHDOG_FACTOR", 0.0)
    monkeypatch.setattr(module, "_WATCH_SECONDS", 0.2)
    device = Device(1, 64, MEMORY, Metrics("test"))
    device.start()
    session = FakeSession()
    session.block()
    assert device.problem == ""
    line = batcher(device, session)
    hung = [asyncio.create_task(line.embed([ids(3)])) for _ in range(2)]
    await started(session)
    assert "hangs" in device.problem
    for request in hung:
        with pytest.raises(RunError):
            await request
    assert device.problem == ""
    assert device.idle
    device.stop()


async def test_nothing_keeps_a_run_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither slots nor the watch for hung runs hold the last one: its model would stay as long."""
    monkeypatch.setattr(module, "_WATCH_SECONDS", 0.01)
    device = Device(1, 64, MEMORY, Metrics("test"))
    device.start()
    session = FakeSession()
    session.block()
    line = batcher(device, session)
    request = asyncio.create_task(line.embed([ids(3)]))
    await started(session)
    gone = weakref.ref(next(iter(device._running)))
    await asyncio.sleep(0.1)  # it has been watched
    session.release()
    await request
    for _ in range(500):
        if gone() is None:
            break
        await asyncio.sleep(0.01)
    assert gone() is None
    device.stop()


async def test_abandoned_run_is_stopped(device: Device) -> None:
    """A run whose clients have all left ends; one that somebody still waits for goes on."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    gone, stays = (asyncio.create_task(line.embed([ids(length)])) for length in (4, 5))
    await asyncio.sleep(0)
    first.cancel()
    await started(session)
    gone.cancel()
    await asyncio.gather(first, gone, return_exceptions=True)
    session.release()
    assert (await stays)[0][0] == 5
    assert session.batches == [[9], [4, 5]]


async def test_a_run_takes_its_threads_cores() -> None:
    """Two runs of two threads each fill four cores; the third one waits."""
    device = Device(4, 64, MEMORY, Metrics("test"))
    device.start()
    session = FakeSession(threads=2)
    line = batcher(device, session)
    session.block()
    tasks = [asyncio.create_task(line.embed([ids(60)] * 3))]
    await started(session)
    await started(session)
    assert len(device._running) == 2
    session.release()
    await asyncio.gather(*tasks)
    assert session.batches == [[60]] * 3
    device.stop()


async def test_dead_slot_is_replaced() -> None:
    """A slot whose thread ends is replaced and counted; its batch is tried again."""
    metrics = Metrics("test")
    device = Device(1, 64, MEMORY, metrics)
    device.start()
    session = FakeSession(deadly=999)
    line = batcher(device, session)
    with pytest.raises(RunError):
        await line.embed([ids(3, first=998)])
    assert (await line.embed([ids(3)]))[0][0] == 3
    assert metrics.total(metrics.slot_restarts) == 1
    assert device.problem == ""
    device.stop()


class Broken(FakeSession):
    """A session whose GPU is gone."""

    def run(self, *_: object, **__: object) -> Rows:
        """See `Session`."""
        raise DeviceLostError("CUDA failure 700: an illegal memory access was encountered")


async def test_lost_device(device: Device) -> None:
    """Its requests are told so, and the device does not serve any more."""
    with pytest.raises(DeviceLostError):
        await batcher(device, Broken()).embed([ids(3)])
    assert device.lost.startswith("CUDA failure 700")
    assert device.problem == "a GPU is lost, the server ends"


async def test_one_wake_up_per_batch(device: Device) -> None:
    """However many texts a batch has, the event loop is woken once for it."""
    session, wakeups = FakeSession(), 0
    finish = device._finish

    def count(run: Run) -> None:
        nonlocal wakeups
        wakeups += 1
        finish(run)

    device._finish = count  # type: ignore[method-assign]
    await batcher(device, session).embed([ids(8)] * 32)
    assert wakeups == len(session.batches) == 4


class Forgetful(FakeSession):
    """A session that leaves out its last vector."""

    def run(self, texts: Any, **options: Any) -> Any:
        """See `Session`."""
        return super().run(texts, **options)[:-1]


async def test_too_few_vectors_are_a_failure(device: Device) -> None:
    """A session that answers with fewer vectors than asked for fails its requests, none hangs."""
    with pytest.raises(RunError):
        await batcher(device, Forgetful()).embed([ids(10), ids(3)])


async def test_cancelled_request_leaves_the_line(device: Device) -> None:
    """Texts that have not started are never run once their request is gone."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    gone = asyncio.create_task(line.embed([ids(4)] * 3))
    await asyncio.sleep(0)
    assert line.waiting == 3
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert repr(line) == "Batcher('fake', waiting=0)"
    session.release()
    await first
    assert session.batches == [[9]]
    assert repr(device) == "Device(cores=1, running=0, Schedule(interactive=0, bulk=0))"


async def test_cancelled_request_in_a_run_harms_nobody(device: Device) -> None:
    """A request that leaves while its batch runs does not disturb its neighbours."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    gone, stays = (asyncio.create_task(line.embed([ids(length)])) for length in (4, 5))
    await asyncio.sleep(0)
    session.release_one()
    await first
    await started(session)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    session.release()
    assert session.batches == [[9], [4, 5]]
    assert (await stays)[0][0] == 5
    assert np.isfinite(await line.embed([ids(3)])).all()


async def test_models_take_turns_by_age(device: Device) -> None:
    """Of two models on one slot, the one with the older text goes first."""
    session, other = FakeSession(), FakeSession()
    one, two = batcher(device, session), batcher(device, other)
    session.block()
    busy = asyncio.create_task(one.embed([ids(9)]))
    await started(session)
    order: list[str] = []

    async def run(name: str, line: Batcher) -> None:
        await line.embed([ids(8)])
        order.append(name)

    waiting = [asyncio.create_task(run("two", two)), asyncio.create_task(run("one", one))]
    await asyncio.sleep(0)
    session.release()
    await asyncio.gather(busy, *waiting)
    assert order == ["two", "one"]


async def test_idle_slots_share_one_request() -> None:
    """A lone request of several texts uses all idle slots."""
    device = Device(2, 1000, MEMORY, Metrics("test"))
    device.start()
    session = FakeSession()
    await batcher(device, session).embed([ids(50)] * 8)
    device.stop()
    assert session.batches == [[50] * 4, [50] * 4]


async def test_small_requests_go_before_bulk(device: Device) -> None:
    """A single text that comes after bulk runs in the next batch, and bulk is not starved."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    bulk = asyncio.create_task(line.embed([ids(60)] * 9))
    await started(session)
    singles = [asyncio.create_task(line.embed([ids(40)])) for _ in range(6)]
    await asyncio.sleep(0)
    session.release()
    await asyncio.gather(bulk, *singles)
    assert session.batches == [[60]] + ([[40]] * 3 + [[60]]) * 2 + [[60]] * 6


async def test_costs_are_learned() -> None:
    """Every run on one slot moves the prediction towards what it took; others say nothing."""
    device, session = Device(2, 64, MEMORY, Metrics("test")), FakeSession()
    device.start()
    line = batcher(device, session)
    before = line.cost.seconds(Shape.of([8]))
    await line.embed([ids(8)])  # a wide run
    session.costs_above = 60
    await line.embed([ids(60), ids(60), ids(60)])
    await asyncio.sleep(0)
    assert line.cost.seconds(Shape.of([8])) == before
    session.costs_above = 59
    for _ in range(50):
        await line.embed([ids(60), ids(60), ids(60)])
    assert line.cost.seconds(Shape.of([8])) < before / 2
    device.stop()


async def test_a_lone_batch_is_wide() -> None:
    """A batch that takes all that waits while nothing runs may use all cores, others may not."""
    device = Device(2, 64, MEMORY, Metrics("test"))
    device.start()
    session = FakeSession()
    line = batcher(device, session)
    await line.embed([ids(8)])
    assert session.wide == [True]
    await line.embed([ids(60), ids(60)])
    session.block()
    tasks = [asyncio.create_task(line.embed([ids(8)])) for _ in range(2)]
    await asyncio.sleep(0)
    session.release()
    await asyncio.gather(*tasks)
    assert session.wide == [True, False, False, True, False]
    device.stop()
