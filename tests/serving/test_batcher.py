"""Batcher and device with a fake session: order, sharing, failures, cancellation."""

import asyncio
from collections.abc import AsyncIterator
from itertools import chain

import numpy as np
import pytest
import pytest_asyncio

from embedding_server.observability.metrics import Metrics
from embedding_server.serving.batcher import Batcher, RunError
from embedding_server.serving.device import Device
from tests.fakes import WIDTH, FakeSession, ids


@pytest_asyncio.fixture
async def device() -> AsyncIterator[Device]:
    """A device with one running slot."""
    device = Device(slots=1, max_batch_tokens=64)
    device.start()
    yield device
    device.stop()


def batcher(device: Device, session: FakeSession) -> Batcher:
    """A batcher for `session`."""
    return Batcher("fake", session, device, WIDTH, Metrics("test"))


async def started(session: FakeSession) -> None:
    """Wait until one more run has started."""
    await asyncio.to_thread(session.running.acquire, timeout=10)


async def test_rows_come_back_in_order(device: Device) -> None:
    """A request larger than a batch is spread over several and put together again."""
    session = FakeSession()
    lengths = [40, 3, 17, 60, 90, 5, 5]
    rows = await batcher(device, session).embed(
        [ids(length, index) for index, length in enumerate(lengths)]
    )
    assert rows[:, 0].tolist() == lengths
    assert rows[:, 1].tolist() == list(range(len(lengths)))
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


async def test_failure_reaches_its_requests_only(device: Device) -> None:
    """A failed run is an error for the requests in it; the next ones are served."""
    session = FakeSession(poison=7)
    line = batcher(device, session)
    with pytest.raises(RunError):
        await line.embed([ids(10)])
    assert (await line.embed([ids(5)])).shape == (1, WIDTH)


async def test_rows_of_another_shape_are_a_failure(device: Device) -> None:
    """A session that answers with other rows than asked for fails its requests, none hangs."""
    with pytest.raises(RunError):
        await batcher(device, FakeSession(width=WIDTH + 1)).embed([ids(10)])


async def test_cancelled_request_leaves_the_line(device: Device) -> None:
    """Texts that have not started are never run once their request is gone."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    gone = asyncio.create_task(line.embed([ids(4)] * 3))
    await asyncio.sleep(0)
    assert len(line.pending) == 3
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert repr(line) == "Batcher('fake', Pending(texts=0, tokens=0))"
    session.release()
    await first
    assert session.batches == [[9]]
    assert repr(device) == "Device(slots=1, free=1, waiting=[])"


async def test_cancelled_request_in_a_run_harms_nobody(device: Device) -> None:
    """A request that leaves while its batch runs does not disturb its neighbours."""
    session = FakeSession()
    line = batcher(device, session)
    session.block()
    first = asyncio.create_task(line.embed([ids(9)]))
    await started(session)
    gone, stays = (asyncio.create_task(line.embed([ids(length)])) for length in (4, 5))
    await asyncio.sleep(0)
    session.release()
    await first
    session.block()
    gone.cancel()
    session.release()
    assert (await stays)[0, 0] == 5
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
    device = Device(slots=2, max_batch_tokens=1000)
    device.start()
    session = FakeSession()
    await batcher(device, session).embed([ids(50)] * 8)
    device.stop()
    assert session.batches == [[50] * 4, [50] * 4]
    assert device.work_per_second > 0
