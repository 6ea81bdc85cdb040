"""Cohere's SDK, both of its clients."""

import base64

import cohere
import numpy as np
import pytest

from conftest import DOCUMENTS, LONG, MODEL, QUERY_PROMPT, TEXTS, Native, close, sigmoid

TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
QUERY, DOCUMENT = "search_query", "search_document"


@pytest.fixture
def v1(server: str) -> cohere.Client:
    """The v1 client."""
    return cohere.Client(api_key="any", base_url=server, max_retries=0)


@pytest.fixture
def v2(server: str) -> cohere.ClientV2:
    """The v2 client."""
    return cohere.ClientV2(api_key="any", base_url=server, max_retries=0)


def check_types(found: object, vectors: np.ndarray) -> None:
    """A row per text in each type, made of the floats as the README says."""
    close(found.float, vectors)
    packed = [np.frombuffer(base64.b64decode(text), "<f4") for text in found.base64]
    close(packed, vectors)
    int8, uint8, binary, ubinary = (
        np.array(getattr(found, name)) for name in ("int8", "uint8", "binary", "ubinary")
    )
    assert int8.shape == vectors.shape
    assert (np.abs(int8) <= 127).all()
    scale = (int8 * vectors).sum() / (vectors**2).sum()
    close(int8, np.clip(vectors * scale, -127, 127), 0.6)
    assert (uint8 == int8 + 128).all()
    assert (np.unpackbits(ubinary.astype(np.uint8), axis=1) == (vectors > 0)).all()
    assert (binary == ubinary - 128).all()


def test_v1_embed(v1: cohere.Client, vectors: np.ndarray) -> None:
    """Without types a list of floats, with them all five and base64; the texts are echoed."""
    plain = v1.embed(texts=TEXTS, model=MODEL)
    close(plain.embeddings, vectors)
    typed = v1.embed(texts=TEXTS, model=MODEL, embedding_types=TYPES)
    check_types(typed.embeddings, vectors)
    for found in (plain, typed):
        assert found.texts == TEXTS
        assert found.meta.billed_units.input_tokens > len(TEXTS)


def test_v2_embed(v2: cohere.ClientV2, vectors: np.ndarray) -> None:
    """All types; floats without any; `inputs` are texts as well."""
    check_types(
        v2.embed(texts=TEXTS, model=MODEL, input_type=DOCUMENT, embedding_types=TYPES).embeddings,
        vectors,
    )
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    for given in ({"texts": TEXTS}, {"inputs": inputs}):
        close(v2.embed(**given, model=MODEL, input_type=DOCUMENT).embeddings.float, vectors)


def test_quantised_bytes_are_the_text_s_own(v2: cohere.ClientV2) -> None:
    """A text gets the same bytes in every request, whatever is beside it."""
    alone, beside = (
        v2.embed(texts=texts, model=MODEL, input_type=QUERY, embedding_types=["int8"])
        for texts in (TEXTS[:1], ["short", TEXTS[0], LONG])
    )
    # Where neighbours change the last bit of a float, a number at an edge may move by one.
    assert np.abs(np.subtract(alone.embeddings.int8[0], beside.embeddings.int8[1])).max() <= 1
    again = v2.embed(texts=TEXTS[:1], model=MODEL, input_type=QUERY, embedding_types=["int8"])
    assert again.embeddings.int8 == alone.embeddings.int8


def test_options(v1: cohere.Client, v2: cohere.ClientV2, native: Native) -> None:
    """`output_dimension` cuts, `input_type` is a prompt, `truncate` names a side."""

    def embed(text: str, model: str = MODEL, kind: str = QUERY, **options: object) -> np.ndarray:
        answer = v2.embed(texts=[text], model=model, input_type=kind, **options)
        return np.array(answer.embeddings.float)[0]

    plain, prompted = native.vectors([TEXTS[0], QUERY_PROMPT + TEXTS[0]])
    cut = plain[:64] / np.linalg.norm(plain[:64])
    close(embed(TEXTS[0], output_dimension=64), cut)
    more = {"additional_body_parameters": {"output_dimension": 64}}
    close(v1.embed(texts=TEXTS[:1], model=MODEL, request_options=more).embeddings, [cut])
    close(embed(TEXTS[0], "prompted"), prompted)
    close(embed(TEXTS[0], "prompted", DOCUMENT), plain)
    ends = native.vectors(["second " * 254, "first " * 254])
    close([embed(LONG, truncate=side) for side in ("START", "END")], ends, 1e-5)


def test_batches(v1: cohere.Client, native: Native) -> None:
    """v1 sends 200 texts as three requests at once: the order holds, the counts are summed."""
    texts = [f"text {number}" for number in range(200)]
    found = v1.embed(texts=texts, model=MODEL)
    close(
        found.embeddings,
        np.concatenate([native.vectors(texts[:100]), native.vectors(texts[100:])]),
        1e-5,
    )
    assert found.meta.billed_units.input_tokens == 200 * 4


def test_rerank(v1: cohere.Client, v2: cohere.ClientV2, native: Native) -> None:
    """Best first, cut to `top_n`; v1 returns documents when asked."""
    scores = native.scores(TEXTS[0], DOCUMENTS)
    mixed = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]
    asked = {"query": TEXTS[0], "model": MODEL, "top_n": 2}
    old = v1.rerank(documents=mixed, return_documents=True, **asked)
    new = v2.rerank(documents=DOCUMENTS, **asked)
    for found in (old, new):
        assert [one.index for one in found.results] == [1, 0]
        close([one.relevance_score for one in found.results], [scores[1], scores[0]])
        assert found.meta.billed_units.search_units == 1
    assert [one.document.text for one in old.results] == [DOCUMENTS[1], DOCUMENTS[0]]


def test_rerank_gives_probabilities(v2: cohere.ClientV2, native: Native) -> None:
    """A cross-encoder's scores are logits natively, probabilities here."""
    documents = ["the of", "you that he", "a in it is"]
    found = v2.rerank(model="own/cross-encoder", query="to be", documents=documents).results
    scores = sigmoid(native.scores("to be", documents, "own/cross-encoder"))
    close([one.relevance_score for one in found], sorted(scores, reverse=True))
    close([scores[one.index] for one in found], sorted(scores, reverse=True))


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_tokenize(request: pytest.FixtureRequest, version: str, *, offline: bool) -> None:
    """Ids there and back, without special ones; the default asks for the model first."""
    client: cohere.Client = request.getfixturevalue(version)
    found = client.tokenize(text="hello world", model=MODEL, offline=offline)
    assert found.tokens == [7592, 2088]
    assert found.token_strings == ["hello", "world"]
    back = client.detokenize(tokens=found.tokens, model=MODEL, offline=offline)
    assert back.text == "hello world"


def test_models(v1: cohere.Client) -> None:
    """The list, and one model whose id has a slash."""
    assert {MODEL, "own/cross-encoder"} <= {one.name for one in v1.models.list().models}
    assert v1.models.get(MODEL).name == MODEL


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"model": "no-such"}, cohere.NotFoundError, "no-such"),
        ({"input_type": "nonsense"}, cohere.BadRequestError, "input_type"),
        ({"output_dimension": 9999}, cohere.BadRequestError, "dimension"),
        ({"texts": [LONG], "truncate": "NONE"}, cohere.BadRequestError, "tokens"),
    ],
)
def test_errors(v2: cohere.ClientV2, call: dict, error: type[Exception], says: str) -> None:
    """The SDK's classes, and what is wrong in `message`."""
    with pytest.raises(error) as caught:
        v2.embed(**{"texts": ["x"], "model": MODEL, "input_type": QUERY} | call)
    assert says in caught.value.body["message"]


def test_keys_and_rate(guarded: str) -> None:
    """A wrong key is an `UnauthorizedError`; a right one too often is a `TooManyRequestsError`."""

    def rerank(key: str) -> None:
        client = cohere.ClientV2(api_key=key, base_url=guarded, max_retries=0)
        assert client.rerank(model=MODEL, query="q", documents=["d"]).results

    with pytest.raises(cohere.UnauthorizedError):
        rerank("wrong")
    rerank("cohere")
    with pytest.raises(cohere.TooManyRequestsError) as caught:
        rerank("cohere")
    assert "message" in caught.value.body
