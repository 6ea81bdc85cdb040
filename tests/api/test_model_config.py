"""A YAML file of models, as clients see what it says."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Client, Serve
from tests.hub import LocalHub
from tests.tiny import HIDDEN, MAX_TOKENS, POSITIONS, write_cross_encoder
from tests.zoo import ZOO

Array = NDArray[np.float64]
LONG = " ".join(["the of and"] * 15)
"""45 tokens and two special ones."""
CUT = 5

YAML = f"""
models:
  alias: {{name: tiny}}
  cut: {{name: tiny, type: embeddings, dimensions: {CUT}}}
  first: {{name: tiny, pooling: cls}}
  long: {{name: tiny, max_tokens: {POSITIONS}}}
  short: {{name: tiny, max_tokens: 4}}
  prompted: {{name: tiny, prompts: {{query: "you that ", document: "he was "}}}}
  int8: {{name: tiny, precision: int8}}
  cosine: {{name: cut-too, type: rerank, dimensions: {CUT}}}
  scores: {{name: ./cross, type: rerank}}
"""


@pytest.fixture
def config(tmp_path: Path, models: Path) -> Path:
    """The file, beside a reranker and a link to an embedder."""
    write_cross_encoder(tmp_path / "cross")
    (tmp_path / "cut-too").symlink_to(models / "tiny")
    (tmp_path / "models.yaml").write_text(YAML)
    return tmp_path / "models.yaml"


async def embed(client: Client, model: str, *texts: str, **options: object) -> Array:
    """Vectors of shape (texts, dimensions)."""
    body = {"model": model, "input": list(texts), **options}
    answer = await client.post("/api/embed", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    rows = np.array(answer.json()["embeddings"])
    assert answer.json()["dimensions"] == rows.shape[1]
    return rows


def unit(rows: Array) -> Array:
    """Rows of length 1."""
    scaled: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


async def test_models_of_a_file(serve: Serve, config: Path) -> None:
    """Clients use keys as names, and every override has its effect."""
    nothing: dict[str, Any] = {"allowed_embedding_models": (), "allowed_rerank_models": ()}
    async with serve(model_config=config, **nothing) as client:
        texts = ("the of and", "a", LONG)
        plain = await embed(client, "alias", *texts)
        assert np.abs(plain - await embed(client, "tiny", *texts)).max() < 1e-6
        cut = await embed(client, "cut", *texts)
        assert cut.shape == (len(texts), CUT)
        assert np.abs(cut - unit(plain[:, :CUT])).max() < 1e-6
        less = await embed(client, "cut", *texts, dimensions=3)
        assert np.abs(less - unit(plain[:, :3])).max() < 1e-6
        raw = await embed(client, "cut", *texts, normalize=False)
        assert np.abs(unit(raw) - cut).max() < 1e-6
        first = await embed(client, "first", *texts)
        assert np.abs(first - plain).max() > 1e-3
        int8 = await embed(client, "int8", *texts)
        assert np.abs(int8 - plain).max() > 0
        assert np.vecdot(int8, plain).min() > 0.9
        await _limits(client)
        await _prompts(client)
        await _lists(client)
        await _rerank(client)


async def _limits(client: Client) -> None:
    """A limit above that of the files, up to the positions, and one below."""
    truncated = {}
    for name in ("alias", "long", "short"):
        answer = await client.post("/api/embed", json={"model": name, "input": [LONG, "a"]})
        fingerprint = answer.headers["x-model-fingerprint"]
        truncated[name] = (answer.headers.get("x-truncated-inputs"), fingerprint)
    assert [cut for cut, _ in truncated.values()] == ["1", None, "1"]
    assert len({fingerprint for _, fingerprint in truncated.values()}) == 3
    shorter = await embed(client, "short", "the of", "the of and to")
    assert (shorter[0] == shorter[1]).all()


async def _prompts(client: Client) -> None:
    """The file's prompts, not those of the model's directory."""
    (query,) = await embed(client, "prompted", "is it", input_type="query")
    (document,) = await embed(client, "prompted", "is it", input_type="document")
    plain = await embed(client, "alias", "you that is it", "he was is it")
    assert np.abs(plain - [query, document]).max() < 1e-6


async def _lists(client: Client) -> None:
    """Keys are in every list, with what they change."""
    embedders = (await client.get("/api/embedders")).json()
    dimensions = {row["id"]: row["dimensions"] for row in embedders}
    names = {"alias", "cut", "first", "long", "short", "prompted", "int8"}
    assert dimensions == dict.fromkeys(names, HIDDEN) | {"cut": CUT}
    rerankers = (await client.get("/api/rerankers")).json()
    assert [row["id"] for row in rerankers] == ["cosine", "scores"]
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert set(cards) == {*names, "tiny", "cosine", "scores"}
    limits = [cards[name]["max_model_len"] for name in ("tiny", "alias", "long", "short")]
    assert limits == [MAX_TOKENS, MAX_TOKENS, POSITIONS, 4]
    residents = (await client.get("/health/status")).json()["models"]
    assert set(residents) == set(cards) - {"alias"}
    precisions = [residents[name]["precision"] for name in ("tiny", "int8")]
    assert precisions == ["fp32", "int8"]
    refused = await client.post("/api/embed", json={"model": "cut", "text": "a", "dimensions": 6})
    assert f"from 1 to {CUT}, got 6" in refused.json()["error"]
    empty = await client.post("/api/embed", json={"model": "cut", "input": []})
    assert empty.json()["dimensions"] == CUT
    refused = await client.post("/api/embed", json={"model": "cosine", "text": "a"})
    assert refused.json()["code"] == "UNSUPPORTED_MODEL"


async def _rerank(client: Client) -> None:
    """By the cosine of what is left of vectors, and by a cross-encoder's own scores."""
    body = {"model": "cosine", "query": "the of", "documents": ["and to in", "is it"]}
    ranked = (await client.post("/api/rerank", json=body)).json()["results"]
    query, *documents = await embed(client, "cut", "the query: the of", *body["documents"])
    scores = {one["index"]: one["score"] for one in ranked}
    assert [scores[0], scores[1]] == pytest.approx(list(documents @ query), abs=1e-6)
    answer = await client.post("/api/rerank", json=body | {"model": "scores"})
    assert len(answer.json()["results"]) == 2


async def test_preload_names_keys(serve: Serve, config: Path) -> None:
    """Named are models of their own and further names; the others load when they are asked for."""
    async with serve(model_config=config, preload=("alias", "short")) as client:
        models = (await client.get("/health/status")).json()["models"]
        ready = {name for name, model in models.items() if model["state"] == "ready"}
        assert ready == {"tiny", "short"}
        await asyncio.gather(*(embed(client, name, "a") for name in ("tiny", "other", "cut")))


async def test_other_kinds(serve: Serve, tmp_path: Path) -> None:
    """Late-interaction models are cut per token, in rerankings too; sparse ones get names."""
    colbert, splade = "colbert-ir/colbertv2.0", "prithivida/Splade_PP_en_v1"
    config = tmp_path / "models.yaml"
    config.write_text(f"""models:
      whole: {{name: {colbert}, type: late-interaction}}
      cut: {{name: {colbert}, type: late-interaction, dimensions: {CUT}}}
      ranks: {{name: {colbert}, type: rerank, dimensions: {CUT}}}
      sparse: {{name: {splade}, type: sparse-embeddings}}
    """)
    with LocalHub() as hub:
        for name, repo in ((colbert, colbert), (splade, "Qdrant/Splade_PP_en_v1")):
            ZOO[name](directory := tmp_path / repo.replace("/", "-"))
            paths = [path for path in directory.rglob("*") if path.is_file()]
            files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
            hub.publish(repo, files)
        settings: dict[str, Any] = {"allowed_embedding_models": (), "allowed_rerank_models": ()}
        settings |= {"hf_endpoint": hub.url, "hf_home": tmp_path / "hf", "model_config": config}
        async with serve(**settings) as client:
            body = {"model": "whole", "text": "the of", "output": "tokens", "normalize": False}
            whole = (await client.post("/api/embed", json=body)).json()
            cut = (await client.post("/api/embed", json=body | {"model": "cut"})).json()
            assert cut["dimensions"] == CUT
            rows, expected = np.array(cut["embeddings"][0]), np.array(whole["embeddings"][0])
            assert np.abs(rows - expected[:, :CUT]).max() < 1e-6
            query = body | {"model": "cut", "text": "of", "input_type": "query"}
            asked = (await client.post("/api/embed", json=query)).json()["embeddings"][0]
            best = (unit(np.array(asked)) @ unit(rows).T).max(axis=1).sum()
            body = {"model": "ranks", "query": "of", "documents": ["the of"]}
            (ranked,) = (await client.post("/api/rerank", json=body)).json()["results"]
            assert ranked["score"] == pytest.approx(best, abs=1e-4)
            body = {"model": "sparse", "text": "the of"}
            assert (await client.post("/api/embed/sparse", json=body)).status_code == 200
