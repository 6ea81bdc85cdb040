"""Model lists, and loading and unloading by request: who waits, who is refused, what is ready."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.dialects import TEXT, blocked, failure, native, post
from tests.conftest import Client, Serve, parts_of
from tests.tiny import HIDDEN, MAX_TOKENS

LISTS = ("/v1/models", "/api/v1/models", "/models")
BODY = {"model": "tiny", "text": TEXT}


async def switch(client: Client, action: str, name: str = "tiny") -> None:
    """Load or unload a model, and check what is said about it."""
    answer = await client.post(f"/api/v1/models/{name}/{action}")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "status": "success",
        "message": f"Model {name} is {action}ed",
        "model_id": name,
        "loaded": action == "load",
    }


async def loaded(client: Client, name: str = "tiny") -> bool:
    """What a model's card says."""
    card = (await client.get(f"/api/v1/models/{name}")).json()
    assert card["loaded"] is card["is_cached"]
    return bool(card["loaded"])


async def test_lists(serve: Serve, tmp_path: Path) -> None:
    """Each has the fields of every dialect, for every name, and each name a card of its own."""
    (tmp_path / "models.yaml").write_text("models:\n  org/short: {name: tiny, dimensions: 8}\n")
    async with serve(model_config=tmp_path / "models.yaml") as client:
        answers = [(await client.get(path)).json() for path in LISTS]
        assert answers[0] == answers[1] == answers[2]
        assert set(answers[0]) == {
            "object", "data", "models", "total",
            "required_models", "cached_models", "allowed_models",
        }  # fmt: skip
        cards = {card["id"]: card for card in answers[0]["data"]}
        assert list(cards) == ["org/short", "other", "tiny"]
        for name, card in cards.items():
            for path in LISTS:
                for spelled in (name, name.replace("/", "%2F")):
                    assert (await client.get(f"{path}/{spelled}")).json() == card
            times = {key: card[key] for key in ("load_time", "loaded_at", "last_used")}
            assert all(times.values())
            assert card == times | {
                "id": name,
                "object": "model",
                "created": card["created"],
                "owned_by": "org" if "/" in name else "local",
                "max_model_len": MAX_TOKENS,
                "dimensions": 8 if "/" in name else HIDDEN,
                "task": "embed",
                "name": name,
                "type": "embeddings",
                "loaded": True,
                "model_name": name,
                "is_cached": True,
            }


async def test_unknown_models(client: Client) -> None:
    """They are a 404, in OpenAI's shape but below `/api/v1`."""
    for path in LISTS:
        dialect = "unified" if "api" in path else "openai"
        for name in ("nope", "org/nope", "tiny/more"):
            message = failure(dialect, await client.get(f"{path}/{name}"), 404)
            assert f"Model {name} is not in the allowed models list" in message
    for action in ("load", "unload"):
        for name in ("nope", "org/nope", ""):
            answer = await client.post(f"/api/v1/models/{name}/{action}")
            assert "not in the allowed" in failure("unified", answer, 404)


async def test_unload_and_load(client: Client) -> None:
    """What was unloaded is not missed by readiness, and comes back by itself or by request."""
    rows = await native(client, TEXT)
    await switch(client, "unload")
    assert not await loaded(client)
    card = (await client.get("/models/tiny")).json()
    assert [card[key] for key in ("load_time", "loaded_at", "last_used")] == [None] * 3
    lists = (await client.get("/models")).json()
    assert (lists["required_models"], lists["cached_models"]) == (["other"], ["other"])
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["embedding"]) == (200, True)
    await switch(client, "unload")
    await switch(client, "load")
    assert await loaded(client)
    await switch(client, "unload")
    assert (await native(client, TEXT) == rows).all()
    assert await loaded(client)
    await switch(client, "unload", "other")
    await switch(client, "unload")
    assert (await client.get("/health/ready")).status_code == 200
    text = (await client.get("/metrics")).text
    assert 'evictions_total{model="tiny",reason="asked"} 3.0' in text


async def test_by_get(client: Client) -> None:
    """The deprecated way loads, with any number of slashes behind it, and does not unload."""
    await switch(client, "unload")
    for action in ("load", "load/"):
        assert (await client.get(f"/api/v1/models/tiny/{action}")).json()["loaded"]
    assert (await client.get("/api/v1/models/tiny/unload")).status_code == 404
    assert await loaded(client)


async def test_what_is_required_comes_back(serve: Serve) -> None:
    """A model of the preload list stays again once it is loaded, or where unloading failed."""
    async with serve(preload=("tiny",), queue_timeout_ms=200) as client:
        registry = parts_of(client).engine.registry
        tiny = registry.residents["tiny"]
        await switch(client, "unload")
        assert registry.pinned == []
        await switch(client, "load")
        assert registry.pinned == [tiny]
        with tiny:
            answer = await client.post("/api/v1/models/tiny/unload")
        assert answer.status_code == 503
        assert answer.json()["detail"].startswith("Service unavailable: tiny is still in use")
        assert registry.pinned == [tiny]


async def test_names_that_end_like_actions(serve: Serve, tmp_path: Path) -> None:
    """The longer name wins for a card, and has actions of its own."""
    (tmp_path / "models.yaml").write_text("models:\n  tiny/load: {name: other}\n")
    async with serve(model_config=tmp_path / "models.yaml", preload=()) as client:
        assert (await client.get("/api/v1/models/tiny/load")).json()["id"] == "tiny/load"
        assert not await loaded(client)
        await switch(client, "load", "tiny/load")
        assert await loaded(client, "other")
        await switch(client, "load")
        assert await loaded(client)


async def test_other_actions(client: Client) -> None:
    """A POST that says neither is a 405, and needs no body to say so."""
    for path in ("tiny", "tiny/delete", "org/tiny"):
        answer = await client.post(f"/api/v1/models/{path}")
        assert "/load and /unload alone" in failure("unified", answer, 405)


async def started(client: Client, session: Any) -> asyncio.Task[httpx.Response]:
    """A request that `tiny` is busy with."""
    task = asyncio.create_task(client.post("/api/embed", json=BODY))
    await asyncio.to_thread(session.running.acquire, timeout=10)
    return task


async def test_unload_while_in_use(serve: Serve) -> None:
    """It waits for who is inside; who comes meanwhile waits for the model to be loaded again."""
    async with blocked(serve) as (client, session):
        inside = await started(client, session)
        unloading = asyncio.create_task(client.post("/api/v1/models/tiny/unload"))
        resident = parts_of(client).engine.registry.residents["tiny"]
        while not resident.closing:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(client.post("/api/embed", json=BODY))
        while not resident.waiting:
            await asyncio.sleep(0.001)
        assert not unloading.done()
        session.release()
        answers = await asyncio.gather(inside, unloading, late)
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert len(session.batches) == 1
        assert await loaded(client)


async def test_unload_of_a_busy_model(serve: Serve) -> None:
    """It is given up after the queue's timeout with a 503, and the model serves as before."""
    async with blocked(serve, queue_timeout_ms=50) as (client, session):
        inside = await started(client, session)
        answer = await client.post("/api/v1/models/tiny/unload")
        assert "tiny is still in use" in failure("unified", answer, 503)
        session.release()
        assert (await inside).status_code == 200
        assert await loaded(client)
        assert len((await post(client, "/api/embed", **BODY))["embeddings"]) == 1
        assert len(session.batches) == 2
        assert 'reason="busy"} 1.0' in (await client.get("/metrics")).text


async def test_unload_by_a_client_who_leaves(serve: Serve) -> None:
    """Nothing waits for an unload that nobody wants any more."""
    async with blocked(serve, queue_timeout_ms=500) as (client, session):
        inside = await started(client, session)
        unloading = asyncio.create_task(client.post("/api/v1/models/tiny/unload"))
        resident = parts_of(client).engine.registry.residents["tiny"]
        while not resident.closing:
            await asyncio.sleep(0.001)
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        session.release()
        assert (await inside).status_code == 200
        assert len((await post(client, "/api/embed", **BODY))["embeddings"]) == 1
        assert len(session.batches) == 2


async def test_load_that_fails(serve: Serve) -> None:
    """It is a 503 with a time to try again; the card says that the model is not loaded."""
    async with serve(preload=()) as client:
        weights = parts_of(client).engine.catalog.models["other"].directory / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        try:
            answer = await client.post("/api/v1/models/other/load")
        finally:
            weights.write_bytes(whole)
        assert failure("unified", answer, 503).startswith("Failed to load model: ")
        assert not await loaded(client, "other")
        await switch(client, "unload", "other")


async def test_one_place(serve: Serve) -> None:
    """Loading one makes room by unloading another."""
    async with serve(max_loaded_models=1) as client:
        for name, other in (("tiny", "other"), ("other", "tiny"), ("tiny", "other")):
            await switch(client, "load", name)
            assert await loaded(client, name)
            assert not await loaded(client, other)
