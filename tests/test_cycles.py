"""However a request ends, it leaves nothing that only Python's search for cycles would free.

The server lets it run very rarely (`server._GC_THRESHOLD`): a refusal whose traceback holds
a model would keep hundreds of MB after the model was unloaded.
"""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest

from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.session import OnnxSession
from embedding_server.serving.batcher import Batcher
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.test_cancellation import BODY as CALL
from tests.test_cancellation import Caller, use
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "input": ["the of and", "a"]}


@pytest.fixture
def no_search() -> Iterator[None]:
    """Python looks for no cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _busy(client: Client) -> tuple[FakeSession, Caller]:
    """A session that a request keeps busy until it is released."""
    session = FakeSession(width=HIDDEN)
    session.block()
    use(client, session)
    caller = Caller(client)
    await asyncio.to_thread(session.running.acquire, timeout=10)
    return session, caller


async def _wrong(client: Client) -> None:
    for body in (b"{", b'{"model": "gpt-5", "text": "a"}', CALL.replace(b"input", b"inputs")):
        assert (await client.post("/api/embed", content=body)).status_code == 400
    long = {"model": "tiny", "text": "a b " * 50, "truncate": False}
    assert (await client.post("/api/embed", json=long)).status_code == 400


async def _fails(client: Client) -> None:
    use(client, FakeSession(width=HIDDEN, poison=2))
    assert (await client.post("/api/embed", json=BODY)).status_code == 500
    rerank = {"model": "tiny", "query": "a", "documents": ["b"]}
    assert (await client.post("/api/rerank", json=rerank)).status_code == 500


async def _refused(client: Client) -> None:
    session, caller = await _busy(client)
    assert (await client.post("/api/embed", json=BODY)).status_code == 503
    session.release()
    await caller.task


async def _pushed_out(client: Client) -> None:
    session, caller = await _busy(client)
    waiting = [Caller(client) for _ in range(2)]
    await asyncio.sleep(0.01)
    parts_of(client).engine.queue._push_out("127.0.0.1")
    session.release()
    await asyncio.gather(caller.task, *(one.task for one in waiting))
    statuses = [one.sent[0]["status"] for one in (caller, *waiting)]
    assert statuses == [200, 200, 503]


async def _late(client: Client) -> None:
    session, caller = await _busy(client)
    late = client.post("/api/embed", json=BODY | {"timeout_ms": 50})
    assert (await late).status_code == 504
    session.release()
    await caller.task
    session = FakeSession(width=HIDDEN)
    session.block()
    use(client, session)
    assert (await client.post("/api/embed", json=BODY | {"timeout_ms": 50})).status_code == 504
    session.release()


async def _left(client: Client) -> None:
    session, running = await _busy(client)
    waiting = Caller(client)
    await asyncio.sleep(0.01)
    for one in (waiting, running):
        one.hang_up()
        await one.task
    while not parts_of(client).device.idle:  # the run is stopped
        await asyncio.sleep(0.01)
    session.release()


async def _answered(client: Client) -> None:
    assert (await client.post("/api/embed", json=BODY)).status_code == 200


ONE = {"max_concurrent_requests": 1}
ENDS: Mapping[str, tuple[Callable[[Client], Awaitable[None]], Mapping[str, Any]]] = {
    "answered": (_answered, {}),
    "wrong": (_wrong, {}),
    "the model fails": (_fails, {}),
    "refused at once": (_refused, ONE | {"max_queue_depth": 0}),
    "refused after waiting": (_refused, ONE | {"queue_timeout_ms": 50}),
    "pushed out of the line": (_pushed_out, ONE),
    "past its deadline": (_late, ONE),
    "the client left": (_left, ONE),
}


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("end", ENDS)
async def test_nothing_keeps_an_unloaded_model(serve: Serve, end: str) -> None:
    """However requests for a model ended, it is gone once it is unloaded."""
    work, settings = ENDS[end]
    async with serve(**settings) as client:
        await _answered(client)
        await work(client)
        registry = parts_of(client).engine.registry
        resident = registry.residents["tiny"]
        assert resident.model
        gone = weakref.ref(resident.model.batcher)  # runs hold it, requests the model
        await registry.unload(resident.spec)
        await _until_gone(gone)


@pytest.mark.usefixtures("no_search")
async def test_nothing_keeps_what_a_failed_load_had(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails its check is gone, with its session."""
    made: list[weakref.ref[OnnxSession]] = []
    opened = OnnxSession.__init__

    def remember(session: OnnxSession, *args: Any, **how: Any) -> None:
        opened(session, *args, **how)
        made.append(weakref.ref(session))

    def fail(*_: object, **how: object) -> None:
        raise SessionError("broken")

    async with serve(preload=()) as client:
        monkeypatch.setattr(OnnxSession, "__init__", remember)
        monkeypatch.setattr(OnnxSession, "run", fail)
        assert (await client.post("/api/embed", json=BODY)).status_code == 503
        assert made
        for one in made:
            await _until_gone(one)


async def _until_gone(one: "weakref.ref[Batcher] | weakref.ref[OnnxSession]") -> None:
    for _ in range(200):
        if one() is None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{one()!r} is kept by {gc.get_referrers(one())!r}")
