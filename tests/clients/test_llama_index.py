"""LlamaIndex: its TEI class and its class for servers like OpenAI's."""

import asyncio

import numpy as np
import openai
import pytest
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from conftest import LONG, MODEL, TEXTS, Native, close


@pytest.mark.parametrize("slash", ["", "/"])
def test_tei(server: str, native: Native, vectors: np.ndarray, slash: str) -> None:
    """With a slash at the end of the address it posts to `//embed`."""
    model = TextEmbeddingsInference(model_name=MODEL, base_url=server + slash)
    close(model.get_text_embedding_batch(TEXTS), vectors)
    close(model.get_query_embedding(TEXTS[0]), vectors[0])
    close(asyncio.run(model.aget_text_embedding_batch(TEXTS)), vectors)
    close(model.get_text_embedding(LONG), native.vectors(["first " * 254])[0], 1e-5)


def test_tei_errors(guarded: str) -> None:
    """The class does not look at the status: any failure is a `KeyError`."""
    with pytest.raises(KeyError):
        TextEmbeddingsInference(model_name=MODEL, base_url=guarded).get_text_embedding("x")


def test_openai_like(server: str, vectors: np.ndarray) -> None:
    """Its vectors are the native ones, `dimensions` cuts them, errors are OpenAI's."""

    def model(name: str = MODEL, **options: int) -> OpenAILikeEmbedding:
        where = {"api_base": f"{server}/v1", "max_retries": 1}
        return OpenAILikeEmbedding(model_name=name, **where, **options)

    close(model().get_text_embedding_batch(TEXTS), vectors)
    close(model().get_query_embedding(TEXTS[0]), vectors[0])
    cut = vectors[0, :64]
    close(model(dimensions=64).get_text_embedding(TEXTS[0]), cut / np.linalg.norm(cut))
    with pytest.raises(openai.NotFoundError):
        model("no-such").get_text_embedding("x")
