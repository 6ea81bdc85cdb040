"""Residency: single-flight loading, retries, honest errors."""

import asyncio
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from embedding_server.core import ModelSpec, Pooling, Precision
from embedding_server.errors import ModelLoadError, ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from embedding_server.serving import registry as module
from embedding_server.serving.loader import LoadError
from embedding_server.serving.registry import Registry, Resident, State, plan_evictions
from tests.conftest import Serve


class Stub:
    """What the registry needs of a model."""

    resident_bytes = 1
    provider = "CPUExecutionProvider"
    precision = Precision.FP32


class FakeLoader:
    """Fails as often as told, and waits for `gate`."""

    def __init__(self, failures: int = 0) -> None:
        self.calls = 0
        self.gate = threading.Event()
        self._failures = failures

    def __call__(self, spec: ModelSpec) -> Stub:
        self.calls += 1
        assert self.gate.wait(10)
        if self.calls <= self._failures:
            raise LoadError("model.safetensors is damaged")
        return Stub()


def spec(name: str) -> ModelSpec:
    """A model that does not exist."""
    return ModelSpec(id=name, located=Path(), pooling=Pooling.MEAN, max_tokens=8, dimensions=4)


def open_registry(loader: Any, *names: str, **options: Any) -> Registry:
    """A registry of these models, or one."""
    defaults: dict[str, Any] = {"patience": 5.0, "max_waiting": 20, "metrics": Metrics("test")}
    defaults["calling"] = nullcontext
    return Registry([spec(name) for name in names or "m"], loader, **(defaults | options))


async def hold(registry: Registry, name: str = "m") -> None:
    """Take a lease and give it back."""
    with await registry.lease(spec(name)):
        assert registry.residents[name].users > 0


async def test_concurrent_requests_load_once() -> None:
    """However many requests wait for a cold model, it is loaded once."""
    loader = FakeLoader()
    registry = open_registry(loader)
    requests = [asyncio.create_task(hold(registry)) for _ in range(20)]
    while registry.residents["m"].state is not State.LOADING:
        await asyncio.sleep(0)
    loader.gate.set()
    await asyncio.gather(*requests)
    assert loader.calls == 1
    assert registry.loaded == ["m"]
    assert registry.residents["m"].users == 0


async def test_loading_too_long_is_a_503() -> None:
    """A request does not wait for a cold model for ever."""
    loader = FakeLoader()
    registry = open_registry(loader, patience=0.01)
    with pytest.raises(ModelLoadError, match="still loading"):
        await hold(registry)
    loader.gate.set()
    await registry.stop()


async def test_waiting_line_is_bounded() -> None:
    """More requests than may wait for a cold model are refused at once."""
    loader = FakeLoader()
    registry = open_registry(loader)
    requests = [asyncio.create_task(hold(registry)) for _ in range(20)]
    await asyncio.sleep(0)
    with pytest.raises(ModelLoadError, match="20 requests wait"):
        await hold(registry)
    loader.gate.set()
    await asyncio.gather(*requests)


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt()])
async def test_unexpected_failure_is_a_failure_too(error: BaseException) -> None:
    """A load that ends with an exception nobody expected is failed and retried, not stuck."""

    def load(spec: ModelSpec) -> Stub:
        raise error

    registry = open_registry(load)
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        await hold(registry)
    assert registry.residents["m"].state is State.FAILED
    assert "fire" not in registry.residents["m"].error
    await registry.stop()


async def test_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fails to load says so and serves once a later try succeeds."""
    monkeypatch.setattr(module, "_FIRST_RETRY_SECONDS", 0.01)
    loader = FakeLoader(failures=1)
    loader.gate.set()
    registry = open_registry(loader)
    registry.start([spec("m")])
    with pytest.raises(ModelLoadError, match="tries again"):
        await hold(registry)
    assert registry.residents["m"].error == "model.safetensors is damaged"
    while registry.residents["m"].state is not State.READY:
        await asyncio.sleep(0.01)
    await hold(registry)
    assert loader.calls == 2


async def test_unasked_for_models_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model loaded on demand that fails is tried again by the next request after a while."""
    monkeypatch.setattr(module, "_FIRST_RETRY_SECONDS", 0.05)
    loader = FakeLoader(failures=1)
    loader.gate.set()
    registry = open_registry(loader)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="could not be loaded"):
            await hold(registry)
    assert loader.calls == 1
    await asyncio.sleep(0.06)
    await hold(registry)
    assert loader.calls == 2


async def test_what_still_loads_is_unloaded_then() -> None:
    """Not before, and not for ever: who asked is told when it takes too long."""
    loader = FakeLoader()
    registry = open_registry(loader, patience=0.2)
    registry.start([spec("m")])
    there = registry.residents["m"]
    while there.state is not State.LOADING:
        await asyncio.sleep(0)
    with pytest.raises(ServiceUnavailable, match="m is still loading"):
        await registry.unload(spec("m"))
    assert there.pinned
    unloading = asyncio.create_task(registry.unload(spec("m")))
    await asyncio.sleep(0.01)
    holding = asyncio.create_task(hold(registry))
    await asyncio.sleep(0.01)
    loader.gate.set()
    await asyncio.gather(unloading, holding)
    assert (there.state, there.model, loader.calls) == (State.UNLOADED, None, 1)
    await hold(registry)
    assert loader.calls == 2


async def test_what_is_not_wanted_any_more_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that was to stay and failed to load is left alone once it was unloaded."""
    monkeypatch.setattr(module, "_FIRST_RETRY_SECONDS", 0.05)
    loader = FakeLoader(failures=1)
    loader.gate.set()
    registry = open_registry(loader)
    registry.start([spec("m")])
    await registry.residents["m"].settled.wait()
    await registry.unload(spec("m"))
    await asyncio.sleep(0.1)
    assert loader.calls == 1
    assert registry.residents["m"].state is State.FAILED
    await hold(registry)
    assert loader.calls == 2


def resident(name: str, *, used: float = 0.0, **changes: Any) -> Resident:
    """A resident model, used at some time."""
    one = Resident(spec(name), asyncio.Event())
    one.state, one.used_at = State.READY, used
    for key, value in changes.items():
        setattr(one, key, value)
    return one


def test_what_is_unloaded() -> None:
    """Room is made by the model used longest ago; what is wanted stays, what is old goes."""
    models = [
        resident("new", used=90),
        resident("old", used=10),
        resident("older", used=5),
        resident("pinned", pinned=True),
        resident("busy", users=1),
        resident("wanted", waiting=1),
        resident("cold", state=State.UNLOADED),
    ]

    def evicted(room: int | None, ttl: float) -> list[str]:
        planned = plan_evictions(models, room=room, ttl=ttl, now=100)
        return [one.spec.id for one in planned]

    assert evicted(None, 0) == []
    assert evicted(6, 0) == []
    assert evicted(5, 0) == ["older"]
    assert evicted(0, 0) == ["older", "old", "new"]
    assert evicted(None, 50) == ["older", "old"]
    assert evicted(3, 92) == ["older", "old", "new"]


async def test_least_recently_used_makes_room() -> None:
    """A model beyond the limit takes the place of the one used longest ago, whose memory goes."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", "c", max_loaded=2)
    for name in "aba":
        await hold(registry, name)
    gone = weakref.ref(registry.residents["b"].model)
    await hold(registry, "c")
    assert registry.loaded == ["a", "c"]
    assert registry.residents["b"].state is State.UNLOADED
    for _ in range(500):
        if gone() is None:
            break
        await asyncio.sleep(0.01)
    assert gone() is None
    await hold(registry, "b")
    assert registry.loaded == ["c", "b"]


async def test_models_in_use_stay() -> None:
    """Who needs room waits for a model to be out of use, and is refused if that takes too long."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", max_loaded=1, patience=0.05)
    with await registry.lease(spec("a")):
        with pytest.raises(ModelLoadError, match="b is still fetching"):
            await hold(registry, "b")
        assert registry.loaded == ["a"]
    await asyncio.sleep(0.02)
    assert registry.loaded == ["b"]


async def test_overlapping_requests_do_not_keep_a_model_for_ever() -> None:
    """While another model waits for room, new requests of the busy one stand behind it."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", max_loaded=1)
    order: list[str] = []

    async def use(name: str) -> None:
        with await registry.lease(spec(name)):
            order.append(name)
            await asyncio.sleep(0.03)

    tasks = [asyncio.create_task(use("a"))]
    while not registry.loaded:
        await asyncio.sleep(0.001)
    tasks.append(asyncio.create_task(use("b")))
    for _ in range(10):
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(use("a")))
    await asyncio.gather(*tasks)
    assert order[0] == "a"
    assert order.index("b") <= 2
    assert order.count("a") == 11


async def test_a_model_that_need_not_go_is_opened_again() -> None:
    """Where another one makes the room, the busy model that was to go serves on."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", "c", max_loaded=2)
    with await registry.lease(spec("a")):
        second = await registry.lease(spec("b"))
        with second:
            waiting = asyncio.create_task(hold(registry, "c"))
            while not registry.residents["a"].closing:
                await asyncio.sleep(0.001)
        await waiting
        assert registry.loaded == ["a", "c"]
        await asyncio.wait_for(hold(registry, "a"), 1.0)


async def test_a_model_goes_only_for_one_that_can_be_had() -> None:
    """Files are fetched before room is made: what cannot be had unloads nothing."""
    loader = FakeLoader()
    loader.gate.set()

    def locate(wanted: ModelSpec) -> ModelSpec:
        if wanted.id == "b":
            raise LoadError("the hub does not answer")
        return wanted

    registry = open_registry(loader, "a", "b", max_loaded=1, locate=locate)
    await hold(registry, "a")
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        await hold(registry, "b")
    assert registry.loaded == ["a"]
    assert registry.residents["b"].error == "the hub does not answer"


async def test_pinned_models_leave_no_room() -> None:
    """Where what is pinned takes all places, that is said at once."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", max_loaded=1)
    registry.start([spec("a")])
    await hold(registry, "a")
    with pytest.raises(ModelLoadError, match="INFERENCE_PRELOAD takes all"):
        await hold(registry, "b")
    await registry.stop()


async def test_evicted_through_http(serve: Serve) -> None:
    """One model makes room for another and comes back, and the health page shows it."""
    async with serve(max_loaded_models=1) as client:
        for name in ("tiny", "other", "tiny"):
            answer = await client.post("/api/embed", json={"model": name, "text": "a"})
            assert answer.status_code == 200
            cache = (await client.get("/health")).json()["cache_info"]
            assert (cache["cached_models"], cache["max_cached"]) == ([name], 1)
        text = (await client.get("/metrics")).text
        assert 'inference_model_evictions_total{model="tiny",reason="room"} 1.0' in text
        assert 'inference_model_resident_bytes{model="other"} 0.0' in text


async def test_idle_models_are_unloaded() -> None:
    """What nobody uses for the time to live goes, unless it is pinned."""
    loader = FakeLoader()
    loader.gate.set()
    registry = open_registry(loader, "a", "b", ttl=0.05)
    registry.start([spec("a")])
    await hold(registry, "a")
    await hold(registry, "b")
    while "b" in registry.loaded:
        await asyncio.sleep(0.01)
    assert registry.loaded == ["a"]
    await registry.stop()
