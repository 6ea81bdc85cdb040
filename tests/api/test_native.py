"""The native dialect in process, over tiny models: answers, options, limits, errors."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Client, Serve
from tests.tiny import HIDDEN, MAX_TOKENS

TEXT = "the and of that"
RERANK: dict[str, Any] = {"model": "tiny", "query": "a", "documents": ["b"]}


async def embed(client: httpx.AsyncClient, **body: Any) -> Any:
    """The parsed answer of a successful request to `/api/embed`."""
    answer = await client.post("/api/embed", json={"model": "tiny"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def rows(client: httpx.AsyncClient, **body: Any) -> Any:
    """The vectors of a successful request as an array."""
    return np.array((await embed(client, **body))["embeddings"], np.float32)


async def test_one_text(client: Client) -> None:
    """`text`, and `input` as a string or a list, give the same answer."""
    answer = await embed(client, text=TEXT)
    assert {key: answer[key] for key in ("model", "count", "dimensions")} == {
        "model": "tiny", "count": 1, "dimensions": HIDDEN,
    }  # fmt: skip
    assert np.linalg.norm(answer["embeddings"][0]) == pytest.approx(1, abs=1e-6)
    assert answer == await embed(client, input=TEXT) == await embed(client, input=[TEXT])


async def test_batch_is_in_order(client: Client) -> None:
    """`/api/embed/batch` gives each text the vector it gets alone, in order."""
    texts = [TEXT, "a", "", "to be on the"]
    for field in ("texts", "input"):
        answer = await client.post("/api/embed/batch", json={"model": "tiny", field: texts})
        assert answer.status_code == 200
        alone = np.concatenate([await rows(client, text=text) for text in texts])
        assert np.abs(np.array(answer.json()["embeddings"]) - alone).max() < 1e-5


async def test_empty_list(client: Client) -> None:
    """No texts are an empty answer, after the model check."""
    assert await embed(client, input=[]) == {
        "embeddings": [], "model": "tiny", "count": 0, "dimensions": HIDDEN,
    }  # fmt: skip
    answer = await client.post("/api/embed", json={"model": "nope", "input": []})
    assert answer.json()["code"] == "UNSUPPORTED_MODEL"


async def test_dimensions_are_cut_then_normalised(client: Client) -> None:
    """A shorter vector is the beginning of the raw one, scaled to length 1."""
    raw = await rows(client, text=TEXT, normalize=False)
    assert abs(np.linalg.norm(raw) - 1) > 0.01
    cut = await rows(client, text=TEXT, dimensions=8)
    assert cut.shape == (1, 8)
    assert np.abs(cut - raw[:, :8] / np.linalg.norm(raw[:, :8])).max() < 1e-6


async def test_base64_is_the_same_vector(client: Client) -> None:
    """base64 rows are the little-endian float32 of the floats."""
    answer = await embed(client, text=TEXT, encoding_format="base64")
    decoded = np.frombuffer(base64.b64decode(answer["embeddings"][0]), "<f4")
    assert np.array_equal(decoded, (await rows(client, text=TEXT))[0])


async def test_prompts(client: Client) -> None:
    """`input_type` puts the model's own prompt before the text, `prompt` another one."""
    expected = await rows(client, text="the query: a")
    assert np.array_equal(await rows(client, text="a", input_type="query"), expected)
    assert np.array_equal(await rows(client, text="a", prompt="the query: "), expected)
    plain = await rows(client, text="a")
    assert np.array_equal(await rows(client, text="a", input_type="document"), plain)
    assert not np.array_equal(plain, expected)


async def test_truncation_is_said(client: Client) -> None:
    """Cut texts are counted in a header; with `truncate: false` they are an error."""
    long = "the " * 100
    answer = await client.post("/api/embed", json={"model": "tiny", "input": [long, "a", long]})
    assert answer.headers["x-truncated-inputs"] == "2"
    kept = await rows(client, text="the " * (MAX_TOKENS - 2))
    assert np.abs(np.array(answer.json()["embeddings"][0]) - kept[0]).max() < 1e-5
    answer = await client.post(
        "/api/embed", json={"model": "tiny", "input": ["a", long], "truncate": False}
    )
    assert answer.status_code == 400
    assert "text 1 has more than 32 tokens" in answer.json()["error"]
    assert (
        "x-truncated-inputs"
        not in (await client.post("/api/embed", json={"model": "tiny", "text": "a"})).headers
    )


async def test_headers(client: Client) -> None:
    """Answers and refusals of inference routes carry the queue's numbers and a request id."""
    for model, status in (("tiny", 200), ("nope", 400)):
        answer = await client.post(
            "/api/embed", json={"model": model, "text": "a"}, headers={"X-Request-Id": "my-id"}
        )
        assert answer.status_code == status
        assert answer.headers["x-queue-depth"] == "0"
        assert answer.headers["x-queue-capacity"] == "1024"
        assert answer.headers["x-estimated-wait-ms"] == "0"
        assert answer.headers["x-request-id"] == "my-id"
        assert ("x-model-fingerprint" in answer.headers) == (status == 200)
    answer = await client.get("/health/live", headers={"X-Request-Id": "bad id\x7f"})
    assert answer.headers["x-request-id"] != "bad id\x7f"


async def test_rerank(client: Client) -> None:
    """Documents come best first with their index, id, text and score; ties in request order."""
    documents = ["of", {"text": TEXT, "id": "mine"}, "of", "to the"]
    body = {"model": "tiny", "query": TEXT, "documents": documents}
    answer = await client.post("/api/rerank", json=body)
    results = answer.json()["results"]
    assert answer.status_code == 200
    assert sorted(one["index"] for one in results) == [0, 1, 2, 3]
    scores = [one["score"] for one in results]
    assert scores == sorted(scores, reverse=True)
    order = [one["index"] for one in results]
    assert order.index(2) == order.index(0) + 1
    (mine,) = (one for one in results if one.get("id") == "mine")
    assert mine["text"] == TEXT
    vectors = await rows(client, input=["the query: " + TEXT, "of", TEXT, "of", "to the"])
    expected = vectors[1:] @ vectors[0]
    assert [one["score"] for one in results] == pytest.approx(expected[order], abs=1e-6)
    assert "id" not in results[order.index(0)]


async def test_rerank_names_what_is_too_long(client: Client) -> None:
    """Errors about length say whether the query or which document is meant; ids may be empty."""
    long = "the " * 100
    cases = ((long, ["a"], "the query has"), ("a", ["b", long], "document 1"))
    for query, documents, said in cases:
        body = RERANK | {"query": query, "documents": documents, "truncate": False}
        assert said in (await client.post("/api/rerank", json=body)).json()["error"]
    body = RERANK | {"documents": [{"text": "a", "id": ""}]}
    assert (await client.post("/api/rerank", json=body)).json()["results"][0]["id"] == ""


async def test_rerank_options(client: Client) -> None:
    """`top_k` and `top_n` cut, `return_scores` hides scores, no documents are no results."""
    body = {"model": "tiny", "query": "a", "documents": ["the", "of", "and"]}
    for top in ({"top_k": 2}, {"top_n": 2}, {"top_k": 3, "top_n": 2}):
        answer = await client.post("/api/rerank", json=body | top)
        assert len(answer.json()["results"]) == 2
    answer = await client.post("/api/rerank", json=body | {"return_scores": False})
    assert all("score" not in one for one in answer.json()["results"])
    answer = await client.post("/api/rerank", json=body | {"documents": []})
    assert answer.json() == {"results": [], "model": "tiny"}


async def test_model_lists(client: Client) -> None:
    """Lists hold the allowed models of their task, by name."""
    assert (await client.get("/api/embedders")).json() == [
        {
            "id": name,
            "name": name,
            "description": "",
            "model_type": "embedding",
            "kind": "dense",
            "dimensions": HIDDEN,
        }
        for name in ("other", "tiny")
    ]
    assert (await client.get("/api/rerankers")).json() == [
        {"id": "tiny", "name": "tiny", "description": "", "model_type": "reranker", "kind": "dense"}
    ]


async def test_compression_is_opt_in(serve: Serve, client: Client) -> None:
    """Answers are gzipped only where the server is told to and the client accepts it."""
    body = {"model": "tiny", "input": [TEXT] * 20}
    plain = await client.post("/api/embed", json=body)
    assert "content-encoding" not in plain.headers
    async with serve(compress=True) as other:
        packed = await other.post("/api/embed", json=body)
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.json() == plain.json()
        refused = await other.post("/api/embed", json=body, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in refused.headers


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/embed", {}, "`model`"),
        ("/api/embed", {"model": "tiny"}, "give either text or input"),
        ("/api/embed", {"model": "tiny", "text": "a", "input": "b"}, "give either text or input"),
        ("/api/embed", {"model": "tiny", "text": 1}, "$.text"),
        ("/api/embed", {"model": "tiny", "input": ["a", None]}, "$.input[1]"),
        ("/api/embed", {"model": "tiny", "input": ["a"] * 129}, "Batch size 129 exceeds maximum"),
        ("/api/embed", {"model": "tiny", "text": "a", "dimensions": 33}, "from 1 to 32"),
        ("/api/embed", {"model": "tiny", "text": "a", "dimensions": 0}, ">= 1"),
        ("/api/embed", {"model": "tiny", "text": "a", "encoding_format": "int8"}, "encoding_fo"),
        ("/api/embed", {"model": "tiny", "text": "a", "input_type": "x"}, "input_type"),
        ("/api/embed", {"model": "tiny", "text": "a", "timeout_ms": 0}, "timeout_ms"),
        ("/api/embed", {"model": "tiny", "text": "a", "prompt": "x" * 10_001}, "prompt"),
        ("/api/embed/batch", {"model": "tiny"}, "give either texts or input"),
        ("/api/embed/batch", {"model": "tiny", "texts": "a"}, "$.texts"),
        ("/api/rerank", RERANK | {"top_k": 0}, "at least 1"),
        ("/api/rerank", RERANK | {"top_n": -1}, "at least 1"),
        ("/api/rerank", RERANK | {"documents": [{}]}, "documents[0]"),
        ("/api/rerank", RERANK | {"documents": ["b"] * 1001}, "maximum of 1000"),
    ],
)  # fmt: skip
async def test_bad_requests(client: Client, path: str, body: Any, said: str) -> None:
    """A wrong request is a 400 that says what is wrong, in the contract's shape."""
    answer = await client.post(path, json=body)
    error = answer.json()
    assert answer.status_code == 400
    assert error["code"] == "BAD_REQUEST"
    assert error["error"].startswith("Bad request: ")
    assert said in error["error"]
    assert error["request_id"] == answer.headers["x-request-id"]


async def test_models_and_tasks(client: Client) -> None:
    """A model that is not allowed, or not for this task, is refused by name."""
    answer = await client.post("/api/embed", json={"model": "gpt", "text": "a"})
    assert (
        answer.json()["error"] == "Unsupported model: Model gpt is not in the allowed models list"
    )
    answer = await client.post(
        "/api/rerank", json={"model": "other", "query": "a", "documents": ["b"]}
    )
    assert answer.status_code == 400
    assert answer.json()["code"] == "UNSUPPORTED_MODEL"


async def test_text_limit(serve: Serve) -> None:
    """`INFERENCE_MAX_TEXT_CHARS` names the text that is over it."""
    async with serve(max_text_chars=10) as client:
        answer = await client.post("/api/embed", json={"model": "tiny", "input": ["a", "a" * 11]})
        assert answer.status_code == 400
        assert "text 1 has 11 characters, the limit is 10" in answer.json()["error"]
        answer = await client.post("/api/rerank", json=RERANK | {"query": "a" * 11})
        assert "the query has 11 characters" in answer.json()["error"]
        body = {"model": "tiny", "text": "a", "input_type": "query"}
        assert (await client.post("/api/embed", json=body)).status_code == 200


async def test_unknown_fields_are_ignored(client: Client) -> None:
    """A field nobody knows changes nothing."""
    assert await embed(client, text="a", colour="red") == await embed(client, text="a")
