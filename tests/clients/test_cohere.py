"""Cohere's SDK, both of its clients."""

import base64

import cohere
import numpy as np
import pytest
from cohere.core.api_error import ApiError

from conftest import MODEL, TEXTS, Start

TYPES = ["float", "int8", "uint8", "binary", "ubinary"]
WIDTHS = {"int8": 384, "uint8": 384, "binary": 48, "ubinary": 48}
DOCUMENTS = ["Berlin is in Germany.", "Paris is the capital of France.", "I like cheese."]


@pytest.fixture
def v1(server: str) -> cohere.Client:
    """The v1 client."""
    return cohere.Client(api_key="any", base_url=server, max_retries=0)


@pytest.fixture
def v2(server: str) -> cohere.ClientV2:
    """The v2 client."""
    return cohere.ClientV2(api_key="any", base_url=server, max_retries=0)


def check_types(found: object, vectors: list[list[float]]) -> None:
    """Each type has a row per text; signs, offsets and ranges agree with the floats."""
    values = {name: np.asarray(getattr(found, name)) for name in TYPES}
    np.testing.assert_allclose(values["float"], vectors, atol=1e-6)
    for name, width in WIDTHS.items():
        assert values[name].shape == (len(TEXTS), width)
    np.testing.assert_array_equal(values["uint8"] - 128, values["int8"])
    np.testing.assert_array_equal(values["ubinary"] - 128, values["binary"])
    bits = np.unpackbits(values["ubinary"].astype(np.uint8), axis=1)
    np.testing.assert_array_equal(bits, np.asarray(vectors) > 0)
    assert np.corrcoef(values["int8"][0], vectors[0])[0, 1] > 0.99


def test_v1_floats(v1: cohere.Client, vectors: list[list[float]]) -> None:
    """Without types an answer is a list of floats, and the texts are echoed."""
    found = v1.embed(texts=TEXTS, model=MODEL)
    assert found.response_type == "embeddings_floats"
    assert found.texts == TEXTS
    np.testing.assert_allclose(np.asarray(found.embeddings), vectors, atol=1e-6)
    assert found.meta is not None
    assert found.meta.billed_units is not None
    assert (found.meta.billed_units.input_tokens or 0) > len(TEXTS)


def test_v1_types(v1: cohere.Client, vectors: list[list[float]]) -> None:
    """All five types in one answer."""
    found = v1.embed(texts=TEXTS, model=MODEL, embedding_types=TYPES)
    assert found.response_type == "embeddings_by_type"
    check_types(found.embeddings, vectors)


def test_v2_types(v2: cohere.ClientV2, vectors: list[list[float]]) -> None:
    """The same in v2, and base64 with them."""
    found = v2.embed(
        texts=TEXTS,
        model=MODEL,
        input_type="search_document",
        embedding_types=[*TYPES, "base64"],
    ).embeddings
    check_types(found, vectors)
    assert found.base64 is not None
    packed = [np.frombuffer(base64.b64decode(text), "<f4") for text in found.base64]
    np.testing.assert_allclose(packed, vectors, atol=1e-6)


def test_quantised_bytes_do_not_depend_on_the_batch(v2: cohere.ClientV2) -> None:
    """One text always gets the same bytes, whatever it is sent with."""
    together, alone = (
        v2.embed(texts=texts, model=MODEL, input_type="search_query", embedding_types=["int8"])
        for texts in (TEXTS, TEXTS[:1])
    )
    assert together.embeddings.int8 is not None
    assert alone.embeddings.int8 is not None
    np.testing.assert_allclose(together.embeddings.int8[0], alone.embeddings.int8[0], atol=1)


def test_v2_default_and_inputs(v2: cohere.ClientV2, vectors: list[list[float]]) -> None:
    """Without types v2 gives floats by type; `inputs` are texts as well."""
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    plain = v2.embed(texts=TEXTS, model=MODEL, input_type="search_query")
    mixed = v2.embed(inputs=inputs, model=MODEL, input_type="search_query")
    for found in (plain, mixed):
        np.testing.assert_allclose(found.embeddings.float, vectors, atol=1e-6)


def test_output_dimension(v2: cohere.ClientV2) -> None:
    """Cut, then normalised; a width the model has not is an error that names the option."""
    found = v2.embed(texts=TEXTS, model=MODEL, input_type="search_query", output_dimension=64)
    rows = np.asarray(found.embeddings.float)
    assert rows.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    with pytest.raises(cohere.BadRequestError, match="output_dimension"):
        v2.embed(texts=TEXTS, model=MODEL, input_type="search_query", output_dimension=9999)


@pytest.mark.parametrize("side", ["START", "END"])
def test_truncation(v2: cohere.ClientV2, side: str) -> None:
    """`truncate` names the side that is cut; NONE is an error."""
    long = "first " * 300 + "second " * 300
    kept = "second " * 254 if side == "START" else "first " * 254
    cut, alone = (
        v2.embed(texts=[text], model=MODEL, input_type="search_query", truncate=side)
        for text in (long, kept)
    )
    np.testing.assert_allclose(cut.embeddings.float, alone.embeddings.float, atol=1e-5)
    with pytest.raises(cohere.BadRequestError, match="truncate|token"):
        v2.embed(texts=[long], model=MODEL, input_type="search_query", truncate="NONE")


def test_batches(v1: cohere.Client, v2: cohere.ClientV2) -> None:
    """v1 sends 200 texts as three requests at once, v2 as one: the order holds."""
    texts = [f"text {number}" for number in range(200)]
    first = v1.embed(texts=texts, model=MODEL)
    second = v2.embed(texts=texts, model=MODEL, input_type="search_document")
    np.testing.assert_allclose(np.asarray(first.embeddings), second.embeddings.float, atol=1e-5)


def test_rerank(v1: cohere.Client, v2: cohere.ClientV2) -> None:
    """Best first, cut to `top_n`; v1 returns documents when asked."""
    old = v1.rerank(
        query=TEXTS[0],
        documents=[DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]],
        model=MODEL,
        top_n=2,
        return_documents=True,
    )
    new = v2.rerank(query=TEXTS[0], documents=DOCUMENTS, model=MODEL, top_n=2)
    for found in (old, new):
        assert len(found.results) == 2
        assert found.results[0].index == 1
        assert found.results[0].relevance_score > found.results[1].relevance_score
        assert found.meta is not None
        assert found.meta.billed_units is not None
        assert found.meta.billed_units.search_units == 1
    assert old.results[0].document is not None
    assert old.results[0].document.text == DOCUMENTS[1]


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_tokenize(request: pytest.FixtureRequest, version: str, *, offline: bool) -> None:
    """Ids there and back, no special ones; the default asks for the model first."""
    client: cohere.Client = request.getfixturevalue(version)
    found = client.tokenize(text="hello world", model=MODEL, offline=offline)
    assert found.tokens == [7592, 2088]
    assert found.token_strings == ["hello", "world"]
    back = client.detokenize(tokens=found.tokens, model=MODEL, offline=offline)
    assert back.text == "hello world"


def test_errors(v2: cohere.ClientV2, start: Start) -> None:
    """The classes of the SDK, with the text in `message`."""
    with pytest.raises(cohere.NotFoundError) as caught:
        v2.embed(texts=["x"], model="no-such", input_type="search_query")
    assert "no-such" in caught.value.body["message"]
    with pytest.raises(cohere.BadRequestError):
        v2.embed(texts=["x"], model=MODEL, input_type="nonsense")
    with start(INFERENCE_API_KEYS="right") as url:
        with pytest.raises(cohere.UnauthorizedError):
            cohere.ClientV2(api_key="wrong", base_url=url).rerank(
                model=MODEL, query="q", documents=["d"]
            )
    with start(INFERENCE_RATE_LIMIT="1") as url:
        limited = cohere.ClientV2(api_key="any", base_url=url, max_retries=0)
        limited.rerank(model=MODEL, query="q", documents=["d"])
        with pytest.raises(ApiError) as over:
            limited.rerank(model=MODEL, query="q", documents=["d"])
        assert isinstance(over.value, cohere.TooManyRequestsError)
