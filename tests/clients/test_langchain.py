"""LangChain: its OpenAI class, which sends token ids unless told not to, and its endpoint's."""

import asyncio

import numpy as np
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import OpenAIEmbeddings

from conftest import MODEL, TEXTS, Native, close


def langchain(url: str, model: str, *, ids: bool) -> OpenAIEmbeddings:
    """As users make it; with `ids`, its default, it sends those of cl100k_base."""
    return OpenAIEmbeddings(
        model=model,
        base_url=f"{url}/v1",
        api_key="any",
        max_retries=0,
        check_embedding_ctx_length=ids,
    )


@pytest.mark.parametrize(
    ("model", "ids"), [(MODEL, False), ("texts-only", False), ("cl100k", True)]
)
def test_texts(server: str, native: Native, model: str, *, ids: bool) -> None:
    """Texts, and ids where the model is told whose they are, give the native vectors."""
    texts = [*TEXTS, "", "two\nlines"]
    vectors = native.vectors(texts)
    embeddings = langchain(server, model, ids=ids)
    close(embeddings.embed_documents(texts), vectors)
    close(embeddings.embed_query(TEXTS[2]), vectors[2])
    close(asyncio.run(embeddings.aembed_documents(texts)), vectors)


def test_refused_ids(server: str) -> None:
    """`token_ids: refuse` makes them an error that says what to do."""
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain(server, "texts-only", ids=True).embed_query("hello")


def test_ids_by_default(server: str, native: Native) -> None:
    """Without a setting they are taken for the model's: wrong vectors, or an error.

    Those of "hello world" are other words of BERT's vocabulary, which nobody can notice; only ids
    that this has not are an error, which names the setting.
    """
    embeddings = langchain(server, MODEL, ids=True)
    wrong = embeddings.embed_query("hello world")
    close(wrong, native.vectors([[15339, 1917]])[0])
    (right,) = native.vectors(["hello world"])
    assert np.dot(wrong, right) < 0.5
    with pytest.raises(openai.BadRequestError, match="token_ids: cl100k_base"):
        embeddings.embed_query(TEXTS[2])


def test_a_text_in_pieces(server: str, native: Native) -> None:
    """It cuts long texts between ids, here inside a character, and takes the vectors' mean."""
    embeddings = langchain(server, "cl100k", ids=True)
    embeddings.embedding_ctx_length = 1
    pieces = native.vectors(["hello", " \ufffd", "\ufffd", "\ufffd"])
    mean = np.average(pieces, axis=0)
    close(embeddings.embed_query("hello 🦜"), mean / np.linalg.norm(mean), 1e-5)


@pytest.fixture
def endpoint(server: str) -> HuggingFaceEndpointEmbeddings:
    """Since 1.2.2 it takes no address as `model`, but its clients can be replaced."""
    embeddings = HuggingFaceEndpointEmbeddings(model=MODEL, model_kwargs={"truncate": True})
    embeddings.client = InferenceClient(server)
    embeddings.async_client = AsyncInferenceClient(server)
    return embeddings


def test_endpoint(endpoint: HuggingFaceEndpointEmbeddings, vectors: np.ndarray) -> None:
    """The endpoint's class gives the native vectors."""
    close(endpoint.embed_documents(TEXTS), vectors)
    close(endpoint.embed_query(TEXTS[0]), vectors[0])
    close(asyncio.run(endpoint.aembed_documents(TEXTS)), vectors)


def test_endpoint_takes_no_batches(endpoint: HuggingFaceEndpointEmbeddings, native: Native) -> None:
    """It sends all documents at once: more than the limit are an error that names it."""
    texts = [f"text {number}" for number in range(128)]
    close(endpoint.embed_documents(texts), native.vectors(texts), 1e-5)
    with pytest.raises(HfHubHTTPError, match="129 exceeds maximum 128"):
        endpoint.embed_documents([*texts, "one more"])
