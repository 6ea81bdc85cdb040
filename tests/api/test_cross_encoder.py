"""Cross-encoders: pairs of query and document, from file to HTTP answer."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from embedding_server.catalog import open_catalog
from embedding_server.core import SEGMENT
from embedding_server.errors import SettingsError
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.settings import Settings
from tests.conftest import Client, Serve, parts_of
from tests.tiny import MAX_TOKENS, cross_encoder_weights, write_cross_encoder

QUERY = "the of and"
DOCUMENTS = ["a", "to in is it you that he was for on", "zebra", "", "the of and " * 30]


@pytest_asyncio.fixture
async def client(serve: Serve, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of an application with one cross-encoder."""
    write_cross_encoder(tmp_path / "scorer")
    async with serve(
        model_path=tmp_path, allowed_embedding_models=(), allowed_rerank_models=("scorer",)
    ) as client:
        yield client


def expected(directory: Path) -> list[float]:
    """The scores of the documents by the book."""
    words, kinds, head = cross_encoder_weights()
    tokenizer = Tokenizer(directory / "tokenizer.json", MAX_TOKENS)
    encodings = tokenizer.encode([(QUERY, document) for document in DOCUMENTS])
    states = [(words[one.item % SEGMENT] + kinds[one.item // SEGMENT]).sum(0) for one in encodings]
    return [float(state @ head[:, 0]) for state in states]


async def test_scores_and_order(client: Client, tmp_path: Path) -> None:
    """Documents come best first with the model's raw scores, segments and cutting included."""
    body = {"model": "scorer", "query": QUERY, "documents": DOCUMENTS}
    answer = await client.post("/api/rerank", json=body)
    results = answer.json()["results"]
    scores = expected(tmp_path / "scorer")
    assert [one["index"] for one in results] == np.argsort(scores)[::-1].tolist()
    for one in results:
        assert one["score"] == pytest.approx(scores[one["index"]], abs=1e-5)
    assert answer.headers["x-truncated-inputs"] == "1"
    alone = await client.post("/api/rerank", json=body | {"documents": DOCUMENTS[1:2], "top_k": 1})
    assert alone.json()["results"][0]["score"] == pytest.approx(scores[1], abs=1e-5)


async def test_limits(client: Client) -> None:
    """No documents are no results; a pair over the limit is named where cutting is off."""
    body: dict[str, Any] = {"model": "scorer", "query": QUERY, "documents": []}
    assert (await client.post("/api/rerank", json=body)).json()["results"] == []
    body |= {"documents": DOCUMENTS, "truncate": False}
    refused = await client.post("/api/rerank", json=body)
    assert refused.status_code == 400
    assert f"the query with document 4 has more than {MAX_TOKENS} tokens" in refused.text


async def test_it_does_not_embed(client: Client, tmp_path: Path) -> None:
    """Asked for vectors it is refused, by a client and in an allow-list."""
    refused = await client.post("/api/embed", json={"model": "scorer", "text": "a"})
    assert refused.json()["code"] == "UNSUPPORTED_MODEL"
    assert (await client.get("/api/rerankers")).json()[0]["model_type"] == "reranker"
    assert parts_of(client).readiness.check().ready
    with pytest.raises(SettingsError, match="'scorer' is a cross-encoder model"):
        open_catalog(Settings(allowed_embedding_models=("scorer",), model_path=tmp_path))
