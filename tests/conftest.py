"""What most tests share: tiny models on disk, and an application over them in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import pytest_asyncio
from hypothesis import settings as generated

from embedding_server.api.parts import Parts
from embedding_server.app import App, create_app
from embedding_server.settings import Settings
from tests.tiny import write_model

# How long an example takes says more about the machine than about us.
generated.register_profile("untimed", deadline=None)
generated.load_profile("untimed")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for `INFERENCE_MODEL_PATH` with the models `tiny` and `other`."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "tiny")
    write_model(root / "other", pooling="cls_token", seed=1)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that all tests of a run share."""
    return tmp_path_factory.mktemp("cache")


class Serve(Protocol):
    """Starts an application in process with changed settings, and waits until it is ready."""

    def __call__(
        self, *, wait: bool = True, **settings: Any
    ) -> AbstractAsyncContextManager["Client"]: ...


class Client(httpx.AsyncClient):
    """A client of an application in this process."""

    app: App


class _Transport(httpx.ASGITransport):
    """Calls the application in this process."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, and let the application do what it leaves for after the answer."""
        answer = await super().handle_async_request(request)
        await asyncio.sleep(0)
        return answer


def parts_of(client: Client) -> Parts:
    """The parts of a client's application."""
    found: Parts = client.app.parts
    return found


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Run an ASGI application's lifespan, as a server does."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    scope: Any = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
        await task


@pytest.fixture
def serve(models: Path, cache: Path) -> Serve:
    """An application over the tiny models, ready, with a client."""

    @asynccontextmanager
    async def start(*, wait: bool = True, **changes: Any) -> AsyncIterator[Client]:
        settings: dict[str, Any] = {
            "allowed_embedding_models": ("tiny", "other"),
            "allowed_rerank_models": ("tiny",),
            "model_path": models,
            "cache_dir": cache,
            "warmup_ms": 0,
        }
        app = create_app(Settings(**(settings | changes)))
        transport = _Transport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with running(app), Client(transport=transport, base_url="http://test") as client:
            client.app = app
            if wait:
                await until_ready(client)
            yield client

    return start


async def until_ready(client: httpx.AsyncClient) -> None:
    """Wait until preloaded models serve."""
    for _ in range(1000):
        if (await client.get("/health/ready")).is_success:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not ready within 10 s")


@pytest_asyncio.fixture
async def client(serve: Serve) -> AsyncIterator[Client]:
    """A client of an application with default settings."""
    async with serve() as client:
        yield client
