"""Names that no list has: from an allow-list over a hub to HTTP answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_server.errors import SettingsError
from tests.catalog.test_discover import CLOSED, files_of
from tests.catalog.test_listing import run
from tests.conftest import Client, Serve, until_ready
from tests.hub import LocalHub
from tests.tiny import HIDDEN, MAX_TOKENS, export, write_cross_encoder, write_model

MODELS = ("graph", "weights", "scorer")
TEXTS = ["the of and", "a"]
QUERY = {"query": "the of", "documents": ["in the", "of", "he was on it"]}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory of own models, one of each form."""
    export(write_model(tmp_path / "own" / "graph", pooling="cls_token"))
    write_model(tmp_path / "own" / "weights", seed=1)
    write_cross_encoder(tmp_path / "own" / "scorer")
    return tmp_path / "own"


@pytest.fixture
def hub(own: Path) -> Iterator[LocalHub]:
    """A hub that has the same models as `some/graph`, `some/weights` and `some/scorer`."""
    with LocalHub() as hub:
        for name in MODELS:
            hub.publish(f"some/{name}", files_of(own / name))
        yield hub


def settings(hub: LocalHub, home: Path, own: Path, **changes: Any) -> dict[str, Any]:
    """Those of a server of all of them."""
    base = {
        "allowed_embedding_models": ("some/graph", "some/weights", "graph", "weights"),
        "allowed_rerank_models": ("some/scorer", "scorer", "some/weights"),
        "model_path": own,
        "hf_endpoint": hub.url,
        "hf_home": home,
    }
    return base | changes


async def assert_same(client: Client) -> None:
    """The hub's models answer what the own ones do."""
    for name in ("graph", "weights"):
        bodies = [{"model": one, "input": TEXTS} for one in (f"some/{name}", name)]
        answers = [(await client.post("/api/embed", json=body)).json() for body in bodies]
        theirs, mine = (np.array(answer["embeddings"]) for answer in answers)
        assert mine.shape == (2, HIDDEN)
        assert np.abs(theirs - mine).max() < 1e-6
    answers = [
        (await client.post("/api/rerank", json=QUERY | {"model": model})).json()["results"]
        for model in ("some/scorer", "scorer")
    ]
    assert answers[0] == answers[1]
    assert len({result["score"] for result in answers[0]}) == 3


async def assert_listed(client: Client) -> None:
    """The lists show what is known of them."""
    rows = (await client.get("/api/embedders")).json()
    assert {row["dimensions"] for row in rows} == {HIDDEN}
    card = (await client.get("/v1/models/some/graph")).json()
    assert (card["dimensions"], card["max_model_len"]) == (HIDDEN, MAX_TOKENS)


async def test_served(serve: Serve, hub: LocalHub, own: Path, tmp_path: Path) -> None:
    """A graph, weights and a cross-encoder, known before they are loaded."""
    async with serve(**settings(hub, tmp_path / "hf", own), preload=()) as client:
        await assert_listed(client)
        await assert_same(client)


async def test_a_hub_that_comes_back(
    serve: Serve, hub: LocalHub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not ready while the hub cannot be reached; then ready, and all is as if it had been."""
    monkeypatch.setattr("embedding_server.serving.registry._FIRST_RETRY_SECONDS", 0.05)
    wanted = settings(hub, tmp_path / "hf", own, hf_endpoint=CLOSED)
    async with serve(**wanted, wait=False) as client:
        models = await _until_failed(client, "some/graph")
        assert "ConnectError" in models["some/graph"]["error"]
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        (reason,) = (one for one in answer.json()["reasons"] if one.startswith("some/graph: "))
        assert "some/graph: ConnectError" in reason
        assert (await client.get("/health/live")).is_success
        rows = {row["name"]: row for row in (await client.get("/api/embedders")).json()}
        assert "dimensions" not in rows["some/graph"]
        refused = await client.post("/api/embed", json={"model": "some/graph", "text": "a"})
        assert (refused.status_code, refused.json()["code"]) == (503, "MODEL_LOAD_ERROR")
        assert (await client.post("/api/embed", json={"model": "graph", "text": "a"})).is_success
        _connect(client, hub)
        await until_ready(client)
        await assert_same(client)
        await assert_listed(client)


async def test_requests_meanwhile(serve: Serve, hub: LocalHub, own: Path, tmp_path: Path) -> None:
    """Requests that come before the model is known are judged by what it turns out to be."""
    wanted = settings(hub, tmp_path / "hf", own, hf_endpoint=CLOSED, preload=())
    wanted |= {"allowed_embedding_models": ("some/graph", "weights")}
    wanted |= {"allowed_rerank_models": ("some/weights", "weights")}
    async with serve(**wanted) as client:
        _connect(client, hub)
        body = {"model": "some/graph", "text": "a"}
        good, bad = await asyncio.gather(
            *(client.post("/api/embed", json=body | {"dimensions": one}) for one in (8, HIDDEN + 1))
        )
        assert len(good.json()["embeddings"][0]) == 8
        assert bad.status_code == 400
        assert f"dimensions must be from 1 to {HIDDEN}" in bad.json()["error"]
        theirs, mine = await asyncio.gather(
            *(
                client.post("/api/rerank", json=QUERY | {"model": model})
                for model in ("some/weights", "weights")
            )
        )
        assert theirs.json()["results"] == mine.json()["results"]


async def test_what_it_turns_out_to_be(
    serve: Serve, hub: LocalHub, own: Path, tmp_path: Path
) -> None:
    """A model that cannot do its task is a load error with the reason, not tried again soon."""
    wanted = settings(hub, tmp_path / "hf", own, hf_endpoint=CLOSED, preload=())
    wanted |= {"allowed_embedding_models": ("some/scorer",), "allowed_rerank_models": ()}
    async with serve(**wanted) as client:
        _connect(client, hub)
        refused = await client.post("/api/embed", json={"model": "some/scorer", "text": "a"})
        assert refused.json()["code"] == "MODEL_LOAD_ERROR"
        assert int(refused.headers["retry-after"]) > 30
        models = (await client.get("/health/status")).json()["models"]
        assert "is a cross-encoder model, which cannot embed" in models["some/scorer"]["error"]


async def test_offline(serve: Serve, hub: LocalHub, own: Path, tmp_path: Path) -> None:
    """What is cached serves without the hub; what is not ends the start."""
    wanted = settings(hub, tmp_path / "hf", own)
    async with serve(**wanted):
        pass
    del hub.requests[:]
    async with serve(**wanted, hf_hub_offline=True) as client:
        await assert_same(client)
    with pytest.raises(SettingsError, match="'some/other' is not known: .*HF_HUB_OFFLINE is set"):
        async with serve(
            **wanted | {"allowed_embedding_models": ("some/other",)}, hf_hub_offline=True
        ):
            pass
    assert hub.requests == []


def test_start_that_fails(hub: LocalHub, tmp_path: Path) -> None:
    """The process ends with status 2 and one line."""
    hub.publish("some/pickle", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    for name, said in (
        ("some/pickle", "'some/pickle' is not known: some/pickle has none of model.onnx, "),
        ("some/grap", "some/grap does not exist or is private (HTTP 401): check it"),
    ):
        env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "offline": "0"}
        ran = run("serve", "--allowed-embedding-models", name, **env)
        assert ran.returncode == 2
        assert len(ran.stderr.splitlines()) == 1
        assert f"INFERENCE_ALLOWED_EMBEDDING_MODELS: '{name}'" in ran.stderr
        assert said in ran.stderr


def _connect(client: Client, hub: LocalHub) -> None:
    """From now on the hub is there."""
    loader: Any = client.app.parts.engine.registry._load
    loader._locator.hub._access["endpoint"] = hub.url


async def _until_failed(client: Client, name: str) -> dict[str, Any]:
    """The status of all models, once loading this one has failed."""
    for _ in range(1000):
        models: dict[str, Any] = (await client.get("/health/status")).json()["models"]
        if models[name]["error"]:
            return models
        await asyncio.sleep(0.01)
    raise AssertionError(models)
