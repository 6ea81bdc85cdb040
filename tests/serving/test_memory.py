"""What GPU memory allows, told by a fake monitor."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.memory import Usage
from embedding_server.runtime.providers import CPU
from embedding_server.serving import memory as module
from embedding_server.serving.batcher import Batcher, RunError
from embedding_server.serving.device import Device
from embedding_server.serving.memory import Ceiling, MemoryGate
from tests.conftest import Serve, parts_of
from tests.fakes import MEMORY, FakeMonitor, FakeSession, batcher, ids
from tests.tiny import HIDDEN


def gate(monitor: FakeMonitor) -> MemoryGate:
    """A gate that has read once."""
    gate = MemoryGate(monitor, 95.0, Metrics("test"))
    gate.poll()
    return gate


def test_threshold_has_hysteresis() -> None:
    """From the threshold on nothing may grow, until clearly less is used."""
    monitor = FakeMonitor(900)
    memory = gate(monitor)
    seen = []
    for used in (900, 949, 950, 940, 901, 899, 949):
        monitor.used = used
        memory.poll()
        seen.append(memory.tight)
    assert seen == [False, False, True, True, True, False, False]
    assert memory.pressure == pytest.approx(94.9)
    assert memory.free == pytest.approx(1.0)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer nothing is held back, and it is said once a minute."""
    said: list[str] = []
    monkeypatch.setattr(module.log, "warning", lambda event, **_: said.append(event))
    monitor = FakeMonitor(990)
    memory = gate(monitor)
    assert memory.tight
    monitor.used = None
    for _ in range(3):
        memory.poll()
    assert (memory.tight, memory.free, memory.pressure) == (False, None, 0.0)
    assert said == ["memory.unknown"]


async def test_polled_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate follows the card by itself, and its metrics show it."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    metrics, monitor = Metrics("test"), FakeMonitor(100)
    memory = MemoryGate(monitor, 95.0, metrics)
    memory.start()
    assert memory.pressure == 10.0
    monitor.used = 960
    while not memory.tight:
        await asyncio.sleep(0.01)
    memory.stop()
    text = metrics.render("")[0].decode()
    assert 'gpu_memory_used_bytes{device="0"} 960.0' in text
    assert 'gpu_memory_total_bytes{device="0"} 1000.0' in text
    assert 'gpu_memory_utilization_percent{device="0"} 96.0' in text
    assert 'gpu_utilization_percent{device="0"} 100.0' in text


def ceiling(used: int, bytes_per_token: float = 10.0) -> Ceiling:
    """That of a session on a card with so much of 1,000 bytes in use."""
    ceiling = Ceiling(gate(FakeMonitor(used)))
    ceiling._bytes_per_token = bytes_per_token
    return ceiling


def test_growth_is_measured_against_what_is_free() -> None:
    """Beyond the largest batch so far, free bytes decide; one token always goes."""
    one = ceiling(850)
    assert one.allowed(1000) == 10
    starting(one, 50).ran(50)
    one._memory._taken = 0
    assert one.allowed(1000) == 60
    assert ceiling(850, 0.0).allowed(1000) == 1000
    assert Ceiling(MEMORY).allowed(1000) == 1000
    assert ceiling(1000).allowed(1000) == 1


def test_free_memory_is_given_once() -> None:
    """What a batch is going to take is not free for the next one, until the card tells."""
    one = ceiling(850)
    for wanted in (6, 1000, 1000):
        tokens = min(wanted, one.allowed(1000))
        one.starts(tokens)
        one.ran(tokens)
    assert one.high_water == 10
    one._memory.poll()
    assert one.allowed(1000) == 10
    one._memory.poll()
    assert one.allowed(1000) == 20


def starting(one: Ceiling, *batches: int) -> Ceiling:
    """The same, with batches of so many tokens running."""
    for tokens in batches:
        one.starts(tokens)
    return one


def test_what_runs_at_once_counts() -> None:
    """Beside others there is room for what ran at once before, and for what is free."""
    one = ceiling(950)
    assert one.room(1000) == 1000  # it has the card for itself
    assert starting(one, 40).room(1000) == 0
    one.ran(40)
    assert starting(one, 30).room(1000) == 10
    assert starting(one, 10).room(1000) == 0
    one.ran(10)
    one.ran(30)
    assert starting(one, 40, 0).room(1000) == 0
    assert starting(ceiling(950, 0.0), 40).room(1000) == 1000


def test_two_at_once_are_not_one_twice_as_large() -> None:
    """What two batches took beside one another is theirs; one text that long would be growth."""
    one = starting(ceiling(850), 30, 30)
    one.ran(30)
    one.ran(30)
    one._memory._monitor = FakeMonitor(970)
    one._memory.poll()
    assert starting(one, 30).room(1000) == 30
    one.stopped(30)
    assert one.allowed(1000) == 30
    assert one.holds_back(31)


def test_growth_is_counted_once() -> None:
    """What a batch that runs is going to take is neither free nor taken twice."""
    one = ceiling(0)  # 95 tokens are free
    assert starting(one, 30).room(1000) == 65
    assert starting(one, 30).room(1000) == 35
    assert starting(one, 30).room(1000) == 5


def test_memory_that_runs_out_beside_another_batch() -> None:
    """What did not fit at once is not remembered as if it had, when the other one ends well."""
    one = starting(ceiling(700), 60, 60)
    one.ran_out(60)
    one.ran(60)
    assert "together=60, limit=30.0" in repr(one)


class Two(FakeMonitor):
    """Two equal cards."""

    def read(self) -> list[Usage]:
        """See `Monitor`."""
        (one,) = super().read()
        return [one, Usage("1", one.used, one.total)]


def test_several_cards() -> None:
    """A batch goes where the fewest tokens run: beside half of them, on two cards."""
    one = starting(Ceiling(gate(Two(950))), 40)
    one._bytes_per_token = 10.0
    assert one.room(1000) == 0
    one.ran(40)
    assert starting(one, 40).room(1000) == 20
    assert starting(one, 40).room(1000) == 0
    one.ran(40)
    one.ran(40)
    assert "high_water=40, together=40" in repr(one)
    one._memory._monitor = FakeMonitor(None)
    one._memory.poll()
    assert one._memory.devices == 2


def test_learning_on_several_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every card runs each size once."""
    monkeypatch.setattr(module, "_LEAST_BYTES_PER_TOKEN", 0.01)
    monitor = Two(100)
    learned, session = Ceiling(gate(monitor)), Growing(monitor)
    learned.learn(session, 256)
    assert [sum(batch) for batch in session.batches] == [512, 512, 4096, 4096]
    assert learned._bytes_per_token == pytest.approx(0.1, rel=0.01)


class Growing(FakeSession):
    """Takes a byte for every tenth token of its largest batch."""

    def __init__(self, monitor: FakeMonitor) -> None:
        super().__init__()
        self._monitor = monitor

    def run(self, texts: Any, **options: Any) -> Any:
        """See `Session`."""
        assert self._monitor.used is not None
        tokens = sum(map(len, texts))
        rows = super().run(texts, **options)
        self._monitor.used = max(self._monitor.used, 100 + tokens // 10)
        return rows


def test_bytes_per_token_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs tell what a token takes, and that as much may run again."""
    monkeypatch.setattr(module, "_LEAST_BYTES_PER_TOKEN", 0.01)
    monitor = FakeMonitor(100)
    learned = Ceiling(gate(monitor))
    learned.learn(Growing(monitor), 256)
    assert learned._bytes_per_token == pytest.approx(0.1, rel=0.01)
    assert learned.high_water == 4096
    monitor.used = 990
    learned._memory.poll()
    assert learned.allowed(10_000) == 4096
    assert not learned.holds_back(256)


def test_learning_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card too small for the larger run still serves, in smaller batches."""
    monitor = FakeMonitor(100)
    learned, session = Ceiling(gate(monitor)), Growing(monitor)
    session.room = 600
    learned.learn(session, 256)
    assert learned.allowed(10_000) <= 2048
    assert learned._bytes_per_token == module._LEAST_BYTES_PER_TOKEN


def test_a_cpu_learns_nothing() -> None:
    """A CPU's memory is not counted."""
    session = FakeSession()
    session.provider = CPU
    for learned, on in (
        (Ceiling(gate(FakeMonitor(100))), session),
        (Ceiling(MEMORY), FakeSession()),
    ):
        learned.learn(on, 256)
        assert (learned._bytes_per_token, on.batches) == (0.0, [])


async def test_a_full_card_refuses_growth_only(serve: Serve) -> None:
    """A text longer than any before is a 503 on a full card; others are answered as ever."""
    async with serve(max_batch_tokens=16) as client:
        device, registry = parts_of(client).device, parts_of(client).engine.registry
        monitor = FakeMonitor(100)
        device.memory._monitor = monitor
        device.memory.poll()
        model = registry.residents["tiny"].model
        assert model
        session = FakeSession(width=HIDDEN)
        model.batcher.session = session
        model.batcher.ceiling = Ceiling(device.memory)
        model.batcher.ceiling._bytes_per_token = 1.0
        body = {"model": "tiny", "input": ["a b c"] * 4}
        assert (await client.post("/api/embed", json=body)).status_code == 200
        monitor.used = 970
        device.memory.poll()
        assert (await client.get("/health/status")).json()["gpu_vram_pressure"] == 97.0
        assert (await client.post("/api/embed", json=body)).status_code == 200
        longer = {"model": "tiny", "text": "a b c d e f g h i j k l m n o p q r s t u v"}
        refused = await client.post("/api/embed", json=longer)
        assert refused.status_code == 503
        assert refused.json()["code"] == "SERVICE_UNAVAILABLE"
        assert "GPU's memory" in refused.json()["error"]
        assert refused.headers["retry-after"]
        assert 'reason="gpu_memory"} 1.0' in (await client.get("/metrics")).text
        monitor.used = 100
        device.memory.poll()
        assert (await client.post("/api/embed", json=longer)).status_code == 200


async def test_out_of_memory_is_latency(device: Device) -> None:
    """A batch that memory does not suffice for is halved until it fits, one request's or not."""
    session = FakeSession()
    session.room = 40
    line = batcher(device, session)
    rows = await line.embed([ids(10, first) for first in range(6)])
    assert np.stack(rows)[:, 1].tolist() == list(range(6))
    assert session.batches == [[10] * 6, [10] * 3, [10] * 3]
    assert session.lean == [False, True, True]
    assert repr(line.ceiling) == "Ceiling(running=0, high_water=30, together=30, limit=30.0)"


async def test_memory_is_remembered_and_tried_again(device: Device) -> None:
    """After memory ran out batches stay small for a while, and then grow again."""
    session = FakeSession()
    session.room = 40
    line = batcher(device, session)
    await line.embed([ids(10)] * 6)
    del session.batches[:]
    await line.embed([ids(10)] * 6)
    assert session.batches == [[10] * 3] * 2
    session.room = 1000
    for _ in range(200):
        await line.embed([ids(10)] * 6)
    assert session.batches[-1] == [10] * 6


async def test_a_text_too_large_for_memory(device: Device) -> None:
    """A text alone gets a second try with the device for itself, then is an error."""
    session = FakeSession()
    session.room = 40
    line = batcher(device, session)
    with pytest.raises(RunError):
        await line.embed([ids(50)])
    assert session.batches == [[50], [50]]
    assert session.lean == [False, True]
    assert (await line.embed([ids(8)]))[0][0] == 8


@contextmanager
def card(slots: int) -> Iterator[tuple[Batcher, FakeSession, Callable[[int], None]]]:
    """A model alone on a card of 1,000 bytes, 5 a token, and what sets how many are in use."""
    monitor = FakeMonitor(500)
    memory = MemoryGate(monitor, 95.0, Metrics("test"))
    device = Device(slots, 64, memory, Metrics("test"))
    device.start()
    session = FakeSession()
    line = batcher(device, session)
    line.ceiling._bytes_per_token = 5.0

    def used(size: int) -> None:
        monitor.used = size
        memory.poll()
        memory.poll()  # what was taken shows with the second

    yield line, session, used
    device.stop()


async def test_a_full_card_is_used_in_full() -> None:
    """What ran before runs at 97 % of the memory; what would need more is cut to what ran."""
    with card(1) as (line, session, used):
        await line.embed([ids(16)] * 3)
        used(970)
        del session.batches[:]
        await line.embed([ids(16)] * 12)
        assert session.batches == [[16] * 3] * 4
        assert line.ceiling.holds_back(49)
        assert not line.ceiling.holds_back(48)
        used(945)
        assert line.ceiling.holds_back(49)
        used(700)
        assert not line.ceiling.holds_back(49)


async def test_two_batches_on_a_full_card() -> None:
    """Two at once run in full where two at once ran before; else one waits for the other."""
    with card(2) as (line, session, used):

        async def together() -> bool:
            session.running = threading.Semaphore(0)
            session.block()
            both = asyncio.gather(line.embed([ids(60)], "a"), line.embed([ids(60)], "b"))
            await asyncio.to_thread(session.running.acquire)
            at_once = await asyncio.to_thread(session.running.acquire, timeout=0.2)
            session.release()
            await both
            return at_once

        await line.embed([ids(60)])
        used(970)
        assert not await together()
        used(500)
        assert await together()
        assert line.ceiling.high_water == 60
        used(970)
        assert await together()


async def test_fp32_has_memory_of_its_own(device: Device) -> None:
    """A row that is run again in fp32, and does not fit there, says nothing of half precision."""
    session, exact = FakeSession(nan=100), FakeSession()
    exact.room = 1
    line = batcher(device, session, lambda: exact)
    await line.embed([ids(40)])
    before = repr(line.ceiling)
    with pytest.raises(RunError):
        await line.embed([ids(10, 100)])
    assert exact.batches == [[10], [10]]
    assert repr(line.ceiling) == before
