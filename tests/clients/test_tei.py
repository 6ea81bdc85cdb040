"""Clients of text-embeddings-inference: huggingface_hub and Haystack."""

import asyncio

import numpy as np
import pytest
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.embedders.huggingface_api import (
    HuggingFaceAPIDocumentEmbedder,
    HuggingFaceAPITextEmbedder,
    HuggingFaceTEISparseTextEmbedder,
)
from haystack_integrations.components.rankers.huggingface_api import (
    HuggingFaceTEIRanker,
    TruncationDirection,
)
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from conftest import LONG, QUERY_PROMPT, TEXTS, Native, close, sigmoid

ENDS = ["second " * 254, "first " * 254]
"""What is left of `LONG`, cut at its left and at its right."""


@pytest.mark.parametrize("path", ["", "/", "/embed"])
def test_hub(server: str, vectors: np.ndarray, path: str) -> None:
    """It posts to the address itself; a user's own token from elsewhere does not matter."""
    client = InferenceClient(server + path, token="hf_other")
    close(client.feature_extraction(TEXTS), vectors)
    close(client.feature_extraction(TEXTS[0]), vectors[:1])

    async def embed() -> np.ndarray:
        async with AsyncInferenceClient(server + path) as client:
            return await client.feature_extraction(TEXTS)

    close(asyncio.run(embed()), vectors)


def test_hub_options(server: str, native: Native, vectors: np.ndarray) -> None:
    """`normalize`, `dimensions`, `prompt_name`, and `truncate` with a side."""
    embed = InferenceClient(server).feature_extraction
    close(embed(TEXTS, normalize=False), native.vectors(TEXTS, normalize=False))
    cut = vectors[:, :64]
    close(embed(TEXTS, dimensions=64), cut / np.linalg.norm(cut, axis=1, keepdims=True))
    prompted = native.vectors([QUERY_PROMPT + text for text in TEXTS])
    close(embed(TEXTS, prompt_name="query"), prompted)
    for side, end in zip(("left", "right"), native.vectors(ENDS), strict=True):
        close(embed(LONG, truncate=True, truncation_direction=side), [end], 1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"truncate": False}, "tokens"), ({"prompt_name": "no-such"}, "prompt_name")],
)
def test_hub_errors(server: str, options: dict, says: str) -> None:
    """Mistakes are 422s whose text the client shows."""
    with pytest.raises(HfHubHTTPError, match=says) as caught:
        InferenceClient(server).feature_extraction(LONG, **options)
    assert caught.value.response.status_code == 422
    assert caught.value.response.json()["error_type"] == "Validation"


@pytest.mark.parametrize("path", ["", "/similarity"])
def test_hub_similarity(server: str, vectors: np.ndarray, path: str) -> None:
    """`sentence_similarity` gives cosines."""
    found = InferenceClient(server + path).sentence_similarity(TEXTS[0], TEXTS[1:])
    close(found, vectors[1:] @ vectors[0])


def test_keys_and_rate(guarded: str) -> None:
    """A wrong token is a 401, a right one too often a 429."""

    def embed(token: str) -> None:
        assert InferenceClient(guarded, token=token).feature_extraction("x").shape == (1, 384)

    with pytest.raises(HfHubHTTPError, match="key of this server") as wrong:
        embed("wrong")
    embed("hub")
    with pytest.raises(HfHubHTTPError) as often:
        embed("hub")
    assert [one.value.response.status_code for one in (wrong, often)] == [401, 429]
    assert often.value.response.json().keys() == {"error", "error_type"}


def test_haystack_embedders(server: str, native: Native, vectors: np.ndarray) -> None:
    """They ask for no normalisation unless told."""
    where = {"api_type": "text_embeddings_inference", "api_params": {"url": server}, "token": None}
    raw = HuggingFaceAPITextEmbedder(**where).run(TEXTS[0])["embedding"]
    close(raw, native.vectors(TEXTS[:1], normalize=False)[0])
    text = HuggingFaceAPITextEmbedder(**where, normalize=True).run(TEXTS[0])["embedding"]
    close(text, vectors[0])
    documents = HuggingFaceAPIDocumentEmbedder(**where, normalize=True, progress_bar=False).run(
        [Document(content=text) for text in TEXTS]
    )["documents"]
    close([one.embedding for one in documents], vectors)


def test_haystack_sparse(server: str, native: Native) -> None:
    """Weights of words, of the default model that makes such."""
    embedder = HuggingFaceTEISparseTextEmbedder(api_base_url=server, token=None)
    found = embedder.run("the of that")["sparse_embedding"]
    expected = native.weights("the of that")
    assert len(expected) > 10
    assert dict(zip(found.indices, found.values, strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("direction", [None, *TruncationDirection])
def test_haystack_ranker(
    server: str, native: Native, direction: TruncationDirection | None
) -> None:
    """Best first, cut to `top_k`; scores are probabilities, of the end that is kept."""
    texts = ["the of", "you that he", "a in it is", "x " * 30 + "he " * 30]
    ranker = HuggingFaceTEIRanker(url=server, top_k=3, token=Secret.from_token("any"))
    found = ranker.run(
        "to be", [Document(content=text) for text in texts], truncation_direction=direction
    )["documents"]
    # 32 tokens are the model's limit; two are the query's and three are special.
    cut = [*texts[:3], "he " * 27 if direction is TruncationDirection.LEFT else "x " * 27]
    scores = sigmoid(native.scores("to be", cut, "own/cross-encoder"))
    best = sorted(range(4), key=lambda index: -scores[index])[:3]
    assert [one.content for one in found] == [texts[index] for index in best]
    close([one.score for one in found], [scores[index] for index in best])


def test_haystack_errors(guarded: str) -> None:
    """The ranker shows the server's explanation."""
    ranker = HuggingFaceTEIRanker(url=guarded, token=Secret.from_token("wrong"), max_retries=0)
    with pytest.raises(RuntimeError, match="401.*key of this server"):
        ranker.run("q", [Document(content="d")])
