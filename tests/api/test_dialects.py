"""Which dialects are spoken: `INFERENCE_DIALECTS`, and which model those mean that name none."""

import re
from pathlib import Path
from typing import Any

import pytest

from embedding_server.api import ROUTERS, Face
from embedding_server.app import create_app
from embedding_server.errors import SettingsError
from embedding_server.settings import DIALECTS, Settings, load
from tests.api.dialects import ROUTES, failure, native, post, refusal, same
from tests.conftest import Client, Serve

PATHS = {
    "native": (
        "/api/embed", "/api/embed/batch", "/api/embed/sparse", "/api/embed/image", "/api/rerank",
        "/api/embedders", "/api/rerankers",
    ),
    "openai": (
        "/v1/embeddings", "/api/v1/embeddings", "/embeddings", "/v1/score", "/v1/models",
        "/v1/models/{id}", "/api/v1/models", "/api/v1/models/{id}", "/models", "/models/{id}",
    ),
    "cohere": (
        "/v1/embed", "/v2/embed", "/v1/rerank", "/v2/rerank", "/v1/tokenize", "/v1/detokenize",
        "/v1/models", "/v1/models/{id}",
    ),
    "tei": (
        "/", "/embed", "/embed_all", "/embed_sparse", "/rerank", "/similarity", "/tokenize",
        "/decode", "/info",
    ),
    "unified": (
        "/", "/info", "/api/v1/embeddings", "/api/v1/embed", "/api/v1/embed_sparse",
        "/api/v1/rerank",
        "/api/v1/models", "/api/v1/models/{id}", "/api/v1/models/{id}/load",
        "/api/v1/models/{id}/unload",
    ),
    "fast": ("/embed", "/embed/batch", "/models", "/models/{id}"),
}  # fmt: skip
ALWAYS = {"/health", "/health/live", "/health/ready", "/health/status", "/metrics"}


async def described(client: Client) -> dict[str, Any]:
    """The paths of the OpenAPI document."""
    found: dict[str, Any] = (await client.get("/api/openapi.json")).json()["paths"]
    return found


def test_names() -> None:
    """The settings know the dialects that have handlers."""
    named = {name for names, _ in ROUTERS for name in re.split("[ &]", names)}
    assert named == set(DIALECTS) == set(PATHS)
    assert Face.of().inference_routes == Face.of(DIALECTS).inference_routes


async def test_all(client: Client) -> None:
    """Unless told otherwise the server speaks all of them."""
    assert set(await described(client)) == ALWAYS.union(*PATHS.values())


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_one_alone(serve: Serve, dialect: str) -> None:
    """Its paths are there and no others, in the document too; an operator's stay."""
    async with serve(dialects=(dialect,), default_model=("tiny",)) as client:
        paths = await described(client)
        assert set(paths) == ALWAYS | set(PATHS[dialect])
        for path in (*ALWAYS, "/swagger-ui", "/api/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for route in ROUTES:
            answer = await client.post(route.path, json=route.body)
            if route.dialect == dialect:
                assert answer.status_code == 200, route
            elif route.path not in paths:
                assert answer.status_code == 404, route
        nobody = set().union(*PATHS.values()) - set(paths)
        for path in nobody:
            assert (await client.get(path.replace("{id}", "tiny"))).status_code == 404


@pytest.mark.parametrize(
    ("dialect", "path", "what"),
    [
        ("openai", "/v1/models/nope", "model"),
        ("openai", "/api/v1/models/nope", "model"),
        ("openai", "/models/nope", "model"),
        ("openai", "/api/v1/nope", 404),
        ("cohere", "/v1/models/nope", "model"),
        ("cohere", "/v2/nope", 404),
        ("tei", "/", 405),
        ("tei", "/info/nope", 404),
        ("unified", "/api/v1/models/nope", "model"),
        ("unified", "/info/nope", 404),
        ("fast", "/models/nope", "model"),
        ("fast", "/embed", 405),
    ],
)
async def test_failures_of_one_alone(
    serve: Serve, dialect: str, path: str, what: str | int
) -> None:
    """On paths that it shares with others they are in its shape too, as described."""
    async with serve(dialects=(dialect,), preload=()) as client:
        answer = await client.get(path)
        assert failure(dialect, answer, what)
        if what == "model":
            card = (await described(client))[path.replace("nope", "{id}")]["get"]
            assert str(answer.status_code) in card["responses"]


async def test_a_shared_path(serve: Serve) -> None:
    """Of `/embed` only the requests are taken whose dialect is spoken, in its shape."""
    fast, tei = {"model_name": "tiny", "text": "a"}, {"inputs": "a"}
    async with serve(dialects=("native", "tei"), default_model=("tiny",)) as client:
        same(await post(client, "/embed", **tei), await native(client, "a"))
        message = await refusal(client, "tei", "/embed", **fast)
        assert "`inputs`" in message
        assert (await client.get("/models")).status_code == 404
        failure("tei", await client.get("/"), 405)
    async with serve(dialects=("native", "fast"), default_model=("tiny",)) as client:
        answer = await post(client, "/embed", **fast)
        same([answer["embedding"]], await native(client, "a"))
        for body in (tei, {}):
            message = await refusal(client, "fast", "/embed", **body)
            assert "`model_name`" in message
        failure("fast", await client.get("/models/nope"), "model")
        failure("fast", await client.get("/embed"), 405)


async def test_models_below_a_prefix(serve: Serve) -> None:
    """OpenAI's clients find the model lists below their base URL, without loading by GET."""
    async with serve(dialects=("openai",), preload=()) as client:
        assert (await client.get("/api/v1/models/tiny")).json()["id"] == "tiny"
        failure("openai", await client.get("/api/v1/models/tiny/load"), 404)
        failure("openai", await client.post("/api/v1/models/tiny/load"), 405)
        assert not (await client.get("/v1/models/tiny")).json()["loaded"]


async def test_default_models(serve: Serve) -> None:
    """One per task, by any of its names; without one several are too many."""
    async with serve(default_model=("other",)) as client:
        rows = await native(client, "a", model="other")
        same(await post(client, "/embed", inputs="a"), rows)
        answer = await post(client, "/v1/embed", texts=["a"])
        same(answer["embeddings"], rows)
        ranked = await post(client, "/v1/rerank", query="a", documents=["b"])
        assert ranked["model"] == "tiny"
    async with serve() as client:
        for dialect, path, body in (
            ("tei", "/embed", {"inputs": "a"}),
            ("cohere", "/v1/embed", {"texts": ["a"]}),
        ):
            said = "several models serve this: name one in INFERENCE_DEFAULT_MODEL"
            assert said in await refusal(client, dialect, path, **body)
    async with serve(allowed_embedding_models=("other",)) as client:
        same(await post(client, "/embed", inputs="a"), await native(client, "a", model="other"))
    async with serve(allowed_rerank_models=()) as client:
        said = "no allowed model serves this"
        assert said in await refusal(client, "tei", "/rerank", query="a", texts=[])


async def test_a_default_by_another_name(serve: Serve, tmp_path: Path) -> None:
    """A name of the YAML may be meant too."""
    (tmp_path / "models.yaml").write_text("models:\n  mine: {name: other, dimensions: 8}\n")
    async with serve(model_config=tmp_path / "models.yaml", default_model=("mine",)) as client:
        same(await post(client, "/embed", inputs="a"), await native(client, "a", model="mine"))
        assert (await client.get("/info")).json()["model_id"] == "mine"


def test_settings(models: Path) -> None:
    """What is no dialect, or a default that is not allowed, is said at the start."""
    environ = {"INFERENCE_ALLOWED_EMBEDDING_MODELS": "tiny"}
    assert load(environ, {}).dialects == DIALECTS
    some = load(environ | {"INFERENCE_DIALECTS": " TEI, native,tei"}, {})
    assert some.dialects == ("tei", "native")
    expected = "expected a comma list of native, openai, cohere, tei, unified, fast"
    for wrong in ("openai,jina", "open-ai"):
        with pytest.raises(SettingsError, match=f"INFERENCE_DIALECTS='{wrong}': {expected}"):
            load(environ | {"INFERENCE_DIALECTS": wrong}, {})
    settings = Settings(
        allowed_embedding_models=("tiny",), model_path=models, default_model=("other",)
    )
    with pytest.raises(SettingsError, match="INFERENCE_DEFAULT_MODEL='other': the model is in no"):
        create_app(settings)
