"""A client that hangs up frees its place at every stage and costs no compute."""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from embedding_server.core import Encoding, ModelSpec, Side, Text
from embedding_server.serving.model import Model
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN

BODY = json.dumps({"model": "tiny", "input": ["the of and"] * 3}).encode()
EMPTY_QUEUE = "AdmissionQueue(inside=0, waiting=0, work=0.000)"
EMPTY_LINE = "Batcher('tiny', waiting=0)"


class Caller:
    """One raw ASGI request whose connection the test controls."""

    def __init__(self, client: Client, *, whole: bool = True, body: bytes = BODY) -> None:
        self.sent: list[Any] = []
        self.leaves_after_answer = False
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        sent = body if whole else body[:10]
        self._inbox.put_nowait({"type": "http.request", "body": sent, "more_body": not whole})
        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        headers += [(b"content-length", str(len(body)).encode())]
        scope: Any = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/api/embed", "raw_path": b"/api/embed", "query_string": b"",
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80),
        }  # fmt: skip
        self.task = asyncio.create_task(client.app(scope, self._inbox.get, self._send))

    def hang_up(self) -> None:
        """Close the connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if self.leaves_after_answer and message["type"] == "http.response.body":
            self.hang_up()
            await asyncio.sleep(0.01)


@pytest.fixture
def session() -> FakeSession:
    """A session that waits until it is released."""
    session = FakeSession(width=HIDDEN)
    session.block()
    return session


def use(client: Client, session: FakeSession) -> None:
    """Let the application's model run on `session`."""
    model = parts_of(client).engine.registry.residents["tiny"].model
    assert model is not None
    model.batcher.session = session


def assert_whole(client: Client) -> None:
    """Nothing of the requests is left anywhere."""
    engine = parts_of(client).engine
    resident = engine.registry.residents["tiny"]
    assert repr(engine.queue) == EMPTY_QUEUE
    assert resident.model is not None
    assert repr(resident.model.batcher) == EMPTY_LINE
    assert resident.users == 0


async def metric(client: Client, name: str) -> str:
    """The value of a metric without labels."""
    text = (await client.get("/metrics")).text
    (value,) = (line.split()[1] for line in text.splitlines() if line.startswith(f"{name} "))
    return value


async def test_while_sending_the_body(client: Client) -> None:
    """A client that leaves in the middle of its body gets no answer and leaves no trace."""
    caller = Caller(client, whole=False)
    await asyncio.sleep(0.01)
    caller.hang_up()
    await caller.task
    assert caller.sent == []
    assert_whole(client)
    assert await metric(client, "inference_cancelled_requests_total") == "1.0"


async def test_body_that_never_comes(serve: Serve) -> None:
    """A client that sends half a body and waits is told so."""
    async with serve(request_timeout_ms=20) as client:
        caller = Caller(client, whole=False)
        await caller.task
        assert caller.sent[0]["status"] == 408
        assert b"did not arrive" in caller.sent[1]["body"]


async def test_while_waiting_for_admission(serve: Serve, session: FakeSession) -> None:
    """A client that leaves the line is never run, and those behind it move up."""
    async with serve(max_concurrent_requests=1) as client:
        use(client, session)
        inside = Caller(client)
        await asyncio.to_thread(session.running.acquire, timeout=10)
        waiting, behind = Caller(client), Caller(client)
        while parts_of(client).engine.queue.depth < 2:
            await asyncio.sleep(0.001)
        waiting.hang_up()
        await waiting.task
        session.release()
        await asyncio.gather(inside.task, behind.task)
        assert [caller.sent[0]["status"] for caller in (inside, behind)] == [200, 200]
        assert waiting.sent == []
        assert sum(map(len, session.batches)) == 6
        assert_whole(client)


async def test_while_queued_for_a_batch(serve: Serve, session: FakeSession) -> None:
    """Texts whose client left are dropped from the batcher's line before they cost compute."""
    async with serve(threads=1) as client:
        use(client, session)
        running = Caller(client)
        await asyncio.to_thread(session.running.acquire, timeout=10)
        queued = Caller(client)
        model = parts_of(client).engine.registry.residents["tiny"].model
        assert model is not None
        while not model.batcher.waiting:
            await asyncio.sleep(0.001)
        queued.hang_up()
        await queued.task
        assert repr(model.batcher) == EMPTY_LINE
        session.release()
        await running.task
        assert running.sent[0]["status"] == 200
        assert sum(map(len, session.batches)) == 3
        assert_whole(client)


async def test_while_running(serve: Serve, session: FakeSession) -> None:
    """A client that leaves during its run frees its permit at once, the slot after the run."""
    async with serve(threads=1) as client:
        use(client, session)
        caller = Caller(client)
        await asyncio.to_thread(session.running.acquire, timeout=10)
        caller.hang_up()
        await caller.task
        assert caller.sent == []
        assert_whole(client)
        session.release()
        after = Caller(client)
        await after.task
        assert after.sent[0]["status"] == 200
        assert_whole(client)


async def test_after_the_answer(client: Client) -> None:
    """A disconnect that follows the answer is no cancellation."""
    caller = Caller(client)
    caller.leaves_after_answer = True
    await caller.task
    assert caller.sent[0]["status"] == 200
    assert await metric(client, "inference_cancelled_requests_total") == "0.0"
    assert_whole(client)


async def test_a_thousand_hang_ups(serve: Serve) -> None:
    """Clients that leave at random moments leave nothing behind: no place, text, byte or task."""
    async with serve(max_concurrent_requests=8, max_queue_depth=50) as client:
        before, chance = len(asyncio.all_tasks()), random.Random(0)  # noqa: S311 - a seed
        statuses: Counter[int] = Counter()

        async def call() -> None:
            caller = Caller(client, whole=chance.random() > 0.1)
            await asyncio.sleep(chance.uniform(0, 0.03))
            caller.hang_up()
            await caller.task
            statuses[caller.sent[0]["status"] if caller.sent else 0] += 1

        for _ in range(10):
            await asyncio.gather(*(call() for _ in range(100)))
        await asyncio.sleep(0.05)
        assert set(statuses) == {0, 200, 503}
        assert_whole(client)
        assert parts_of(client).device.idle
        assert repr(parts_of(client).device.schedule) == "Schedule(interactive=0, bulk=0)"
        assert len(asyncio.all_tasks()) == before
        assert await metric(client, "inference_queued_bytes") == "0.0"


async def test_while_the_model_loads(serve: Serve) -> None:
    """A client that leaves while its model loads does not stop the load, and waits no more."""
    async with serve(preload=("other",)) as client:
        registry = parts_of(client).engine.registry
        gate, load = threading.Event(), registry._load

        def slow(spec: ModelSpec) -> Model:
            assert gate.wait(10)
            return load(spec)

        registry._load = slow
        caller = Caller(client)
        resident = registry.residents["tiny"]
        while not resident.waiting:
            await asyncio.sleep(0.001)
        assert (await client.get("/health/live")).status_code == 200
        body = {"model": "other", "text": "a"}
        assert (await client.post("/api/embed", json=body)).status_code == 200
        caller.hang_up()
        await caller.task
        assert resident.waiting == 0
        gate.set()
        after = Caller(client)
        await after.task
        assert after.sent[0]["status"] == 200
        assert_whole(client)


async def test_while_tokenising(client: Client) -> None:
    """A client that leaves while its texts are tokenised off the loop frees its place at once."""
    model = parts_of(client).engine.registry.residents["tiny"].model
    assert model
    started, gate = threading.Event(), threading.Event()
    encode = model._encoder.encode

    def slow(texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        started.set()
        assert gate.wait(10)
        return encode(texts, side=side)

    model._encoder.encode = slow  # type: ignore[method-assign]
    body = json.dumps({"model": "tiny", "input": ["the of and " * 50] * 9}).encode()
    caller = Caller(client, body=body)
    await asyncio.to_thread(started.wait, 10)
    caller.hang_up()
    await caller.task
    assert caller.sent == []
    assert_whole(client)
    gate.set()
