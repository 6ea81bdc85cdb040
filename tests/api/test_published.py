"""Published models: from an allow-list over a hub to HTTP answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_server.catalog.files import Hub
from embedding_server.core import Origin
from tests.conftest import Client, Serve, until_ready
from tests.hub import LocalHub
from tests.tiny import MAX_TOKENS, export, write_model

MODEL, BROKEN = "Xenova/bge-small-en-v1.5", "Xenova/bge-base-en-v1.5"
BODY = {"model": MODEL, "input": ["the of and", "a"]}
WEIGHTS = "onnx/model.onnx"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory with the same model as an own one, `own`."""
    export(write_model(tmp_path / "own" / "own", pooling="cls_token", hidden=384))
    return tmp_path / "own"


@pytest.fixture
def hub(own: Path) -> Iterator[LocalHub]:
    """A hub that has the model, and another one whose graph is none."""
    files = {
        str(path.relative_to(own / "own")): path.read_bytes()
        for path in (own / "own").rglob("*")
        if path.is_file() and path.parent.name != "1_Pooling"
    }
    with LocalHub() as hub:
        hub.publish(MODEL, files, lfs=(WEIGHTS,))
        hub.publish(BROKEN, files | {WEIGHTS: b"no graph"}, lfs=(WEIGHTS,))
        yield hub


def settings(hub: LocalHub, home: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """Those of a server that may serve these models from this hub."""
    base = {"allowed_embedding_models": names, "allowed_rerank_models": (), "model_path": None}
    return base | {"hf_endpoint": hub.url, "hf_home": home} | changes


def downloads(hub: LocalHub) -> int:
    """How often the model's graph was sent."""
    return sum(one.method == "GET" and "/cdn/" in one.path for one in hub.requests)


async def test_downloaded_once_and_served(
    serve: Serve, hub: LocalHub, own: Path, tmp_path: Path
) -> None:
    """Concurrent first requests download and load a model once, and get its vectors."""
    wanted = settings(hub, tmp_path / "hf", MODEL, "own", model_path=own, preload=())
    async with serve(**wanted) as client:
        listed = (await client.get(f"/v1/models/{MODEL}")).json()
        assert (listed["max_model_len"], listed["dimensions"]) == (512, 384)
        answers = await asyncio.gather(*(client.post("/api/embed", json=BODY) for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert downloads(hub) == 1
        mine = await client.post("/api/embed", json=BODY | {"model": "own"})
        rows = [np.array(one.json()["embeddings"]) for one in (answers[0], mine)]
        assert np.abs(rows[0] - rows[1]).max() < 1e-6
        listed = (await client.get(f"/v1/models/{MODEL}")).json()
        assert listed["max_model_len"] == MAX_TOKENS
        prompted = await client.post("/api/embed", json=BODY | {"input_type": "query"})
        assert prompted.json()["embeddings"] != answers[0].json()["embeddings"]


async def test_offline(serve: Serve, hub: LocalHub, tmp_path: Path) -> None:
    """What was fetched serves without the hub; what was not says how to get it."""
    Hub(tmp_path / "hf", endpoint=hub.url).fetch(Origin(repo=MODEL, files=(WEIGHTS,)))
    del hub.requests[:]
    wanted = settings(hub, tmp_path / "hf", MODEL, BROKEN, preload=(), hf_hub_offline=True)
    async with serve(**wanted) as client:
        assert (await client.post("/api/embed", json=BODY)).status_code == 200
        refused = await client.post("/api/embed", json=BODY | {"model": BROKEN})
        assert refused.status_code == 503
        assert refused.json()["code"] == "MODEL_LOAD_ERROR"
        status = (await client.get("/health/status")).json()["models"][BROKEN]
        assert "embedding-server fetch" in status["error"]
    assert hub.requests == []


async def test_good_broken_and_unreachable(
    serve: Serve, hub: LocalHub, own: Path, tmp_path: Path
) -> None:
    """One good model serves whatever becomes of the others, and readiness follows the policy."""
    names = ("own", BROKEN, "BAAI/bge-m3")
    wanted = settings(hub, tmp_path / "hf", *names, model_path=own, ready_policy="any")
    async with serve(**wanted) as client:
        await _until_tried(client, BROKEN, "BAAI/bge-m3")
        body = BODY | {"model": "own"}
        assert (await client.post("/api/embed", json=body)).status_code == 200
        for name in names[1:]:
            refused = await client.post("/api/embed", json=BODY | {"model": name})
            assert refused.json()["code"] == "MODEL_LOAD_ERROR"
            assert refused.headers["retry-after"]
        models = (await client.get("/health/status")).json()["models"]
        assert "model.onnx" in models[BROKEN]["error"]
        assert "BAAI/bge-m3 does not exist or is private" in models["BAAI/bge-m3"]["error"]
        assert (await client.get("/health/ready")).is_success
        client.app.parts.readiness._policy = "all"
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert len(answer.json()["reasons"]) == 2


async def test_a_hub_that_comes_back(
    serve: Serve, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that cannot be reached at start is tried again until it answers."""
    monkeypatch.setattr("embedding_server.serving.registry._FIRST_RETRY_SECONDS", 0.05)
    wanted = settings(hub, tmp_path / "hf", MODEL, hf_endpoint="http://127.0.0.1:9")
    async with serve(**wanted, wait=False) as client:
        await _until_tried(client, MODEL)
        assert (await client.get("/health/ready")).status_code == 503
        refused = await client.post("/api/embed", json=BODY)
        assert refused.json()["code"] == "MODEL_LOAD_ERROR"
        loader = client.app.parts.engine.registry._load
        loader._locator.hub._access["endpoint"] = hub.url  # type: ignore[attr-defined]
        await until_ready(client)
        assert (await client.post("/api/embed", json=BODY)).status_code == 200


async def _until_tried(client: Client, *names: str) -> None:
    """Wait until loading these models has failed once."""
    for _ in range(1000):
        models = (await client.get("/health/status")).json()["models"]
        if all(models[name]["error"] for name in names):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(models)
