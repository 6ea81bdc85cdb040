"""Residency: single-flight loading, retries, honest errors."""

import asyncio
import threading
from pathlib import Path

import pytest

from embedding_server.core import ModelSpec, Pooling
from embedding_server.errors import ModelLoadError
from embedding_server.observability.metrics import Metrics
from embedding_server.serving import registry as module
from embedding_server.serving.loader import LoadError
from embedding_server.serving.registry import Registry, State

SPEC = ModelSpec(id="m", directory=Path(), pooling=Pooling.MEAN, max_tokens=8, dimensions=4)


class Stub:
    """What the registry needs of a model."""

    resident_bytes = 1


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


def open_registry(loader: FakeLoader, patience: float = 5.0) -> Registry:
    """A registry of one model."""
    return Registry([SPEC], loader, patience, 20, Metrics("test"))  # type: ignore[arg-type]


async def hold(registry: Registry) -> None:
    """Take a lease and give it back."""
    with await registry.lease(SPEC):
        assert registry.residents["m"].users > 0


async def test_concurrent_requests_load_once() -> None:
    """However many requests wait for a cold model, it is loaded once."""
    loader = FakeLoader()
    registry = open_registry(loader)
    requests = [asyncio.create_task(hold(registry)) for _ in range(20)]
    await asyncio.sleep(0)
    assert registry.residents["m"].state is State.LOADING
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

    registry = Registry([SPEC], load, 5.0, 20, Metrics("test"))  # type: ignore[arg-type]
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
    with pytest.raises(ModelLoadError, match="tries again"):
        await hold(registry)
    assert registry.residents["m"].error == "model.safetensors is damaged"
    while registry.residents["m"].state is not State.READY:
        await asyncio.sleep(0.01)
    await hold(registry)
    assert loader.calls == 2
