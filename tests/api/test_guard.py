"""Overload as clients see it: refused before their bodies are read, in turn, in their dialect."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from embedding_server.serving.model import Model
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "text": "the of and"}


def model_of(client: Client) -> Model:
    """The model `tiny`."""
    model = parts_of(client).engine.registry.residents["tiny"].model
    assert model
    return model


@asynccontextmanager
async def overloaded(serve: Serve, **settings: Any) -> AsyncIterator[tuple[Client, FakeSession]]:
    """An application whose only place is taken and whose line is full."""
    async with serve(max_concurrent_requests=1, max_queue_depth=1, **settings) as client:
        session = FakeSession(width=HIDDEN)
        session.block()
        model_of(client).batcher.session = session
        inside = [asyncio.create_task(client.post("/api/embed", json=BODY)) for _ in range(2)]
        await asyncio.to_thread(session.running.acquire, timeout=10)
        while not parts_of(client).engine.queue.depth:
            await asyncio.sleep(0.001)
        yield client, session
        session.release()
        assert [answer.status_code for answer in await asyncio.gather(*inside)] == [200, 200]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/embed", BODY),
        ("/api/embed/batch", {"model": "tiny", "texts": ["a"]}),
        ("/api/rerank", {"model": "tiny", "query": "a", "documents": ["b"]}),
    ],
)
async def test_refused_before_the_body(serve: Serve, path: str, body: Any) -> None:
    """What would be refused is refused at once, and what its body says does not matter."""
    async with overloaded(serve) as (client, _):
        for content in (body, "no object"):
            answer = await client.post(path, json=content)
            assert answer.status_code == 503
            assert answer.json()["code"] == "SERVICE_UNAVAILABLE"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert int(answer.headers["retry-after-ms"]) >= 1000
            assert answer.headers["x-queue-depth"] == answer.headers["x-queue-capacity"] == "1"
            assert answer.headers["content-type"] == "application/json"
        metrics = (await client.get("/metrics")).text
        assert 'inference_rejections_total{reason="queue_full"} 2.0' in metrics
        assert f'endpoint="{path}",method="POST",status="503"}} 2.0' in metrics


async def test_refused_in_the_dialect(serve: Serve) -> None:
    """OpenAI's clients get OpenAI's error."""
    async with overloaded(serve) as (client, _):
        answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "service_unavailable"
        assert answer.headers["retry-after-ms"]


async def test_browsers_get_their_headers(serve: Serve) -> None:
    """A refusal that a browser asked for carries the headers of CORS."""
    async with overloaded(serve) as (client, _):
        answer = await client.post("/api/embed", json=BODY, headers={"Origin": "http://app"})
        assert answer.status_code == 503
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


async def test_mistakes_are_mistakes_while_there_is_room(client: Client) -> None:
    """Without an overload a wrong body is a 400, and other paths are as ever."""
    assert (await client.post("/api/embed", json="no object")).status_code == 400
    assert (await client.post("/nope", json=BODY)).status_code == 404


async def test_a_flood_does_not_starve_another_address(serve: Serve) -> None:
    """A client of another address is answered in turn with one that has filled the line."""
    async with serve(max_concurrent_requests=1, max_queue_depth=8) as client:
        session = FakeSession(width=HIDDEN)
        session.block()
        model_of(client).batcher.session = session
        done: list[str] = []

        async def call(who: httpx.AsyncClient, name: str) -> int:
            answer = await who.post("/api/embed", json=BODY)
            done.append(f"{name} {answer.status_code}")
            return answer.status_code

        transport = httpx.ASGITransport(client.app, client=("10.0.0.9", 1))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            flood = [asyncio.create_task(call(client, "flood")) for _ in range(9)]
            await asyncio.to_thread(session.running.acquire, timeout=10)
            while parts_of(client).engine.queue.depth < 8:
                await asyncio.sleep(0.001)
            polite = asyncio.create_task(call(other, "polite"))
            while "flood 503" not in done:
                await asyncio.sleep(0.001)
            session.release()
            await asyncio.gather(*flood, polite)
        assert done.count("flood 503") == 1
        assert done.count("flood 200") == 8
        assert done.index("polite 200") <= 3


async def test_bulk_is_not_taken_for_a_small_request(serve: Serve) -> None:
    """While small requests are refused, a body of many short texts goes to its own lane."""
    async with serve(max_queue_depth=2, threads=1, max_batch_tokens=16) as client:
        session = FakeSession(width=HIDDEN)
        session.block()
        model_of(client).batcher.session = session
        long = {"model": "tiny", "text": "the of and a b c d e f g h i j k l m n o p q r s"}
        tasks = [asyncio.create_task(client.post("/api/embed", json=long)) for _ in range(20)]
        while parts_of(client).engine.queue.depth < 2:
            await asyncio.sleep(0.001)
        small = await client.post("/api/embed", json=BODY)
        assert small.status_code == 503
        bulk = {"model": "tiny", "input": ["a"] * 9}
        tasks.append(asyncio.create_task(client.post("/api/embed", json=bulk)))
        await asyncio.sleep(0.02)
        session.release()
        answers = await asyncio.gather(*tasks)
        assert answers[-1].status_code == 200


async def test_large_bodies_are_refused_unread(serve: Serve) -> None:
    """Where no lane has room, a large body is not read; while the server drains, none is."""
    async with overloaded(serve) as (client, _):
        unread = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal unread
            unread += 1
            yield b"x" * 5000

        headers = {"Content-Type": "application/json", "Content-Length": "5000"}
        answer = await client.post("/api/embed", content=body(), headers=headers)
        assert (answer.status_code, unread) == (503, 0)
        client.app.drain()
        answer = await client.post("/api/embed", json=BODY)
        assert "shutting down" in answer.json()["error"]
