"""OpenAI's SDK, sync and async."""

import asyncio
import base64

import numpy as np
import openai
import pytest

from conftest import LONG, MODEL, QUERY_PROMPT, TEXTS, Native, close

HELLO = [7592, 2088]
"""BERT's "hello world"."""


@pytest.fixture
def sdk(server: str) -> openai.OpenAI:
    """As users make it, without the waits of its retries."""
    return openai.OpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0)


def rows(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    """The vectors, as (texts, dimensions)."""
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data], np.float32)


@pytest.mark.parametrize("base", ["/v1", "/api/v1", ""])
def test_floats_and_base64(server: str, vectors: np.ndarray, base: str) -> None:
    """The SDK's own choice, base64, and floats are the native numbers, bit by bit."""
    sdk = openai.OpenAI(base_url=server + base, api_key="any", max_retries=0)
    packed = sdk.embeddings.create(model=MODEL, input=TEXTS)
    close(rows(packed), vectors)
    assert packed.model == MODEL
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > len(TEXTS)
    # One text alone, so that the batch is the same each time.
    one, floats, text = (
        sdk.embeddings.create(model=MODEL, input=TEXTS[0], **form)
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"})
    )
    assert (rows(one) == rows(floats)).all()
    assert base64.b64decode(text.data[0].embedding) == rows(floats).astype("<f4").tobytes()


def test_async(server: str, vectors: np.ndarray) -> None:
    """The async class gives the same, several requests at a time."""

    async def embed() -> list[np.ndarray]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="any") as sdk:
            calls = (sdk.embeddings.create(model=MODEL, input=text) for text in TEXTS)
            return [rows(answer)[0] for answer in await asyncio.gather(*calls)]

    close(asyncio.run(embed()), vectors)


def test_options(sdk: openai.OpenAI, native: Native) -> None:
    """`dimensions`, and the native options in `extra_body`, do what they do natively."""

    def embed(text: str, model: str = MODEL, **extra: object) -> np.ndarray:
        return rows(sdk.embeddings.create(model=model, input=text, extra_body=extra))[0]

    plain, (raw,) = embed(TEXTS[0]), native.vectors(TEXTS[:1], normalize=False)
    (cut,) = rows(sdk.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=64))
    close(cut, plain[:64] / np.linalg.norm(plain[:64]))
    assert np.linalg.norm(raw) > 1.1
    close(embed(TEXTS[0], normalize=False), raw)
    (prompted,) = native.vectors([QUERY_PROMPT + TEXTS[0]])
    assert np.abs(prompted - plain).max() > 0.01
    close(embed(TEXTS[0], prompt=QUERY_PROMPT), prompted)
    close(embed(TEXTS[0], "prompted", input_type="query"), prompted)
    close(embed(TEXTS[0], "prompted", prompt_name="query"), prompted)
    close(embed(TEXTS[0], "prompted"), plain)
    ends = native.vectors(["first " * 254, "second " * 254])
    close(embed(LONG), ends[0], 1e-5)
    close(embed(LONG, truncation_direction="left"), ends[1], 1e-5)


def test_token_ids(sdk: openai.OpenAI, native: Native) -> None:
    """The model's ids, with special ones or without, give the text's vector."""
    (text,) = native.vectors(["hello world"])
    one = sdk.embeddings.create(model=MODEL, input=HELLO)
    several = sdk.embeddings.create(model=MODEL, input=[HELLO, [101, *HELLO, 102]])
    close([*rows(one), *rows(several)], [text] * 3)
    assert (one.usage.prompt_tokens, several.usage.prompt_tokens) == (4, 8)


def test_a_thousand_inputs(sdk: openai.OpenAI, native: Native) -> None:
    """They come back whole and in order."""
    texts = [f"text {number}" for number in range(1000)]
    found = rows(sdk.embeddings.create(model=MODEL, input=texts))
    parts = [native.vectors(texts[start : start + 125]) for start in range(0, 1000, 125)]
    close(found, np.concatenate(parts), 1e-5)


def test_models(sdk: openai.OpenAI) -> None:
    """The list, and one model whose id has a slash, which the SDK sends as `%2F`."""
    listed = {model.id: model for model in sdk.models.list()}
    assert {MODEL, "prompted", "own/sparse"} <= listed.keys()
    assert sdk.models.retrieve(MODEL).owned_by == listed[MODEL].owned_by == "sentence-transformers"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("no/such")


@pytest.mark.parametrize(
    ("call", "error", "code", "says"),
    [
        ({"model": "no/such"}, openai.NotFoundError, "model_not_found", "no/such"),
        ({"dimensions": 9999}, openai.BadRequestError, None, "dimensions"),
        ({"input": [[7592, 99999]]}, openai.BadRequestError, None, "99999.*token_ids: cl100k_base"),
        ({"input": ["x"] * 2049}, openai.BadRequestError, None, "2048"),
        ({"extra_body": {"prompt_name": "no"}}, openai.BadRequestError, None, "prompt_name"),
        (
            {"input": LONG, "extra_body": {"truncate": False}},
            openai.BadRequestError,
            None,
            "tokens",
        ),
    ],
)
def test_errors(
    sdk: openai.OpenAI, call: dict, error: type[openai.APIStatusError], code: str, says: str
) -> None:
    """Mistakes have the SDK's classes, OpenAI's codes, an explanation and the request's id."""
    with pytest.raises(error, match=says) as caught:
        sdk.embeddings.create(**{"model": MODEL, "input": "x"} | call)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code == code
    assert caught.value.request_id


def test_keys_and_rate(guarded: str) -> None:
    """A wrong key is an `AuthenticationError`; a right one too often is a `RateLimitError`."""

    def embed(key: str) -> None:
        sdk = openai.OpenAI(base_url=f"{guarded}/v1", api_key=key, max_retries=0)
        assert sdk.embeddings.create(model=MODEL, input="x").data

    with pytest.raises(openai.AuthenticationError) as caught:
        embed("wrong")
    assert caught.value.code == "invalid_api_key"
    embed("openai")
    with pytest.raises(openai.RateLimitError) as caught:
        embed("openai")
    assert caught.value.code == "rate_limit_exceeded"
