"""What GPU memory allows, told by a fake monitor."""

import asyncio
from typing import Any

import pytest

from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.session import CPU
from embedding_server.serving import memory as module
from embedding_server.serving.memory import Ceiling, MemoryGate, bytes_per_token
from tests.conftest import Serve, parts_of
from tests.fakes import MEMORY, FakeMonitor, FakeSession
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


def test_growth_is_measured_against_what_is_free() -> None:
    """Beyond the largest batch so far, free bytes decide; one token always goes."""
    monitor = FakeMonitor(850)
    ceiling = Ceiling(10.0, gate(monitor))
    assert ceiling.allowed(1000) == 10
    ceiling.ran(50)
    assert ceiling.allowed(1000) == 60
    assert Ceiling(0.0, gate(monitor)).allowed(1000) == 1000
    assert Ceiling(10.0, MEMORY).allowed(1000) == 1000
    full = Ceiling(10.0, gate(FakeMonitor(1000)))
    assert full.allowed(1000) == 1


def test_bytes_per_token_are_learned() -> None:
    """Two runs tell what a token takes; a CPU's memory is not counted."""
    monitor = FakeMonitor(100)

    class Growing(FakeSession):
        """Takes a byte for every tenth token of its largest batch."""

        def run(self, texts: Any, **options: Any) -> Any:
            """See `Session`."""
            assert monitor.used is not None
            monitor.used = max(monitor.used, 100 + sum(map(len, texts)) // 10)
            return super().run(texts, **options)

    session = Growing()
    assert bytes_per_token(session, gate(monitor), 256) == pytest.approx(0.1, rel=0.01)
    assert bytes_per_token(session, MEMORY, 256) == 0.0
    session.provider = CPU
    assert bytes_per_token(session, gate(monitor), 256) == 0.0


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
        model.batcher.ceiling = Ceiling(1.0, device.memory)
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
