"""Every failure, on every route of every dialect: its shape, its status, its headers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.api.dialects import ROUTES, RUNNING, TEXT, Route, blocked, failure, model_of
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN


@pytest_asyncio.fixture
async def client(serve: Serve) -> AsyncIterator[Client]:
    """A client of an application whose default model is `tiny`."""
    async with serve(default_model=("tiny",), max_body_bytes=50_000) as client:
        yield client


async def declared(client: Client) -> dict[str, set[int]]:
    """By path: the statuses that the OpenAPI document has for a POST."""
    paths = (await client.get("/api/openapi.json")).json()["paths"]
    return {
        path: {int(status) for status in one["post"]["responses"]}
        for path, one in paths.items()
        if "post" in one
    }


async def test_every_route_is_tried(client: Client) -> None:
    """The table has every POST route that needs no model of another kind; all of them answer."""
    paths = set(await declared(client))
    others = {"/embed_all", "/embed_sparse", "/api/v1/embed_sparse"}
    others |= {"/api/v1/models/{id}/load", "/api/v1/models/{id}/unload"}
    native = {path for path in paths if path.startswith("/api/") and path[:7] != "/api/v1"}
    assert {route.path for route in ROUTES} == paths - others - native
    for route in ROUTES:
        answer = await client.post(route.path, json=route.body | {"colour": "red"})
        assert answer.status_code == 200, (route, answer.text)
        assert answer.headers["content-type"] == "application/json"
        queue = {"x-queue-depth", "x-queue-capacity", "x-estimated-wait-ms"}
        if route.runs:
            assert {"x-model-fingerprint", "x-request-id"} | queue <= set(answer.headers)


@pytest.mark.parametrize(
    ("content", "headers", "what"),
    [
        (b'{"model": ', {}, "request"),
        (b"[" * 20_000, {}, "request"),
        (b'"\xff"', {}, "request"),
        (b"", {}, "request"),
        (b"[]", {}, "request"),
        (b"no gzip", {"Content-Encoding": "gzip"}, "request"),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Encoding": "br"}, 415),
        (b" " * 60_000, {}, 413),
    ],
)
async def test_bodies_that_cannot_be_read(
    client: Client, content: bytes, headers: dict[str, str], what: str | int
) -> None:
    """Malformed, damaged, too large or of another type: in the dialect's shape, as declared."""
    statuses = await declared(client)
    for route in ROUTES:
        given = {"Content-Type": "application/json"} | headers
        answer = await client.post(route.path, content=content, headers=given)
        assert failure(route.early, answer, what)
        assert answer.status_code in statuses[route.path], route


async def test_wrong_fields(client: Client) -> None:
    """A field that is missing or of another type is named, in each dialect's shape."""
    for route in ROUTES:
        for name in route.body:
            answer = await client.post(route.path, json=route.body | {name: 1.5})
            early = "request" if route.early == route.dialect else 422
            assert f"$.{name}" in failure(route.early, answer, early), route
    answer = await client.post("/embed", json={"model_name": "tiny"})
    assert "model_name and text" in failure("fast", answer, "request")
    assert "inputs, or" in failure("tei", await client.post("/embed", json={}), "request")


async def test_unknown_models(client: Client) -> None:
    """A model that is not allowed is a failure of that kind, with the name in it."""
    for route in ROUTES:
        if route.model:
            answer = await client.post(route.path, json=route.body | {route.model: "org/gpt"})
            message = failure(route.dialect, answer, "model")
            assert "Model org/gpt is not in the allowed models list" in message


async def test_unknown_paths_and_methods(client: Client) -> None:
    """404 and 405 are in the shape of the dialect that the path belongs to."""
    for route in ROUTES:
        if route.path != "/":
            assert failure(route.early, await client.get(route.path), 405)
            missing = await client.post(f"{route.path}/more/nope", json={})
            assert failure(route.early, missing, 404)
    for path, dialect in (("/", "tei"), ("/info", "tei"), ("/models", "openai")):
        assert failure(dialect, await client.put(path), 405)
    for path, dialect in (("/v2/x", "cohere"), ("/v1/x", "openai"), ("/api/v1/x", "unified")):
        assert failure(dialect, await client.get(path), 404)


async def test_keys(serve: Serve) -> None:
    """Without a key every route is a 401 in its dialect's shape, with one it answers."""
    async with serve(default_model=("tiny",), api_keys=("secret",)) as client:
        for route in ROUTES:
            answer = await client.post(route.path, json=route.body)
            assert failure(route.early, answer, 401).startswith("Unauthorized: ")
            assert answer.headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = "Bearer secret"
        for route in ROUTES:
            assert (await client.post(route.path, json=route.body)).status_code == 200


async def wait(client: Client, session: FakeSession) -> list[asyncio.Task[httpx.Response]]:
    """Two requests, of which one is inside and one in line."""
    body = {"model": "tiny", "text": TEXT}
    tasks = [asyncio.create_task(client.post("/api/embed", json=body)) for _ in range(2)]
    await asyncio.to_thread(session.running.acquire, timeout=10)
    while not parts_of(client).engine.queue.depth:
        await asyncio.sleep(0.001)
    return tasks


async def test_a_full_line(serve: Serve) -> None:
    """Overload says when to come back, refused unread, and pages of other origins may read it."""
    async with blocked(serve, max_concurrent_requests=1, max_queue_depth=1) as (client, session):
        statuses = await declared(client)
        tasks = await wait(client, session)
        for route in RUNNING:
            answer = await client.post(route.path, json=route.body)
            assert failure(route.early, answer, "overload").startswith("Service unavailable: ")
            assert answer.headers["x-queue-depth"] == "1"
            browser = {"Origin": "http://app"}
            answer = await client.post(route.path, json=route.body, headers=browser)
            assert failure(route.early, answer, "overload")
            assert answer.headers["access-control-allow-origin"] == "*"
            assert answer.status_code in statuses[route.path]
        session.release()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200, 200]


async def test_no_room_for_bytes(serve: Serve) -> None:
    """So does the budget of bytes, before a handler is called."""
    async with blocked(serve, max_queued_bytes=150) as (client, session):
        body = {"model": "tiny", "text": TEXT, "filler": "x" * 80}
        task = asyncio.create_task(client.post("/api/embed", json=body))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        for route in RUNNING:
            content = json.dumps(route.body).ljust(140)
            headers = {"Content-Type": "application/json"}
            answer = await client.post(route.path, content=content, headers=headers)
            assert failure(route.early, answer, "overload")
        session.release()
        assert (await task).status_code == 200


async def test_draining(client: Client) -> None:
    """A server that stops refuses with 503 in every dialect, and closes connections."""
    client.app.drain()
    for route in RUNNING:
        for headers in ({}, {"Origin": "http://app"}):
            answer = await client.post(route.path, json=route.body, headers=headers)
            assert "shutting down" in failure(route.early, answer, 503)
            assert answer.headers["connection"] == "close"


async def test_deadlines(serve: Serve) -> None:
    """`X-Request-Timeout-Ms` passes as a 504; one that is no number is refused by name."""
    async with blocked(serve) as (client, _):
        for route in RUNNING:
            for value, what in (("5", 504), ("soon", "request")):
                headers = {"X-Request-Timeout-Ms": value}
                answer = await client.post(route.path, json=route.body, headers=headers)
                message = failure(route.dialect, answer, what)
                assert "not done within" in message or "X-Request-Timeout-Ms" in message


async def test_failures_of_ours(client: Client) -> None:
    """A failing model and a defect say nothing of what is inside."""
    model = model_of(client)
    session = model.batcher.session
    model.batcher.session = FakeSession(width=HIDDEN, poison=2)
    for route in RUNNING:
        answer = await client.post(route.path, json=route.body)
        assert "poisoned" not in failure(route.dialect, answer, "backend")
    model.batcher.session = session
    model.estimate = None  # type: ignore[method-assign,assignment]
    for route in RUNNING:
        answer = await client.post(route.path, json=route.body)
        assert "NoneType" not in failure(route.dialect, answer, 500)


async def test_models_that_do_not_load(serve: Serve) -> None:
    """They are a 503 that says when to come back; nothing of the server's files is in it."""
    async with serve(default_model=("other",), preload=()) as client:
        weights = parts_of(client).engine.catalog.models["other"].directory / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        changes: dict[str | None, Any] = {None: {}, "model": {"model": "other"}}
        changes["model_name"] = {"model_name": "other"}
        try:
            for route in ROUTES:
                if "rank" not in route.path and "score" not in route.path:
                    answer = await client.post(route.path, json=route.body | changes[route.model])
                    message = failure(route.dialect, answer, 503)
                    assert message.startswith("Failed to load model: ")
                    assert "safetensors" not in message
        finally:
            weights.write_bytes(whole)


@pytest.mark.parametrize("route", [one for one in RUNNING if one.dialect != "tei"], ids=str)
async def test_models_of_another_task(serve: Serve, route: Route) -> None:
    """A model that only reranks does not embed, and the other way round."""
    lists: dict[str, Any] = {"allowed_embedding_models": ("other",)}
    async with serve(**lists, preload=()) as client:
        ranks = "rank" in route.path or "score" in route.path
        assert route.model
        wrong = route.body | {route.model: "other" if ranks else "tiny"}
        answer = await client.post(route.path, json=wrong)
        assert "another task" in failure(route.dialect, answer, "model")
