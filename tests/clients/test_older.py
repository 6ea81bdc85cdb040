"""The two older APIs, which have no SDK of their own: requests and answers as they print them."""

from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

from conftest import DOCUMENTS, MODEL, TEXTS, Native, close

SPARSE = "own/sparse"


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    """Without any key."""
    with httpx.Client(base_url=server) as client:
        yield client


def post(http: httpx.Client, path: str, **body: object) -> object:
    """The answer of a request that succeeds."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_unified_embeddings(http: httpx.Client, vectors: np.ndarray) -> None:
    """OpenAI's shape, for one text and for several; its users call it by OpenAI's SDK, too."""
    asked = {"model": MODEL, "encoding_format": "float"}
    one = post(http, "/api/v1/embeddings", input=TEXTS[0], **asked)
    several = post(http, "/api/v1/embeddings", input=TEXTS, **asked)
    assert one.keys() == {"object", "data", "model", "usage"}
    assert one["data"][0].keys() == {"object", "embedding", "index"}
    assert one["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    for answer, count in ((one, 1), (several, 3)):
        assert (answer["object"], answer["model"]) == ("list", MODEL)
        assert [part["index"] for part in answer["data"]] == list(range(count))
        close([part["embedding"] for part in answer["data"]], vectors[:count])
    sdk = openai.OpenAI(base_url=str(http.base_url.join("/api/v1")), api_key="any")
    close(
        [part.embedding for part in sdk.embeddings.create(model=MODEL, input=TEXTS).data], vectors
    )
    assert MODEL in [model.id for model in sdk.models.list()]


def test_unified_embed(http: httpx.Client, native: Native, vectors: np.ndarray) -> None:
    """Bare lists of vectors; its options are those of the engine."""
    close(post(http, "/api/v1/embed", input=TEXTS, model=MODEL), vectors)
    options = {"normalize_embeddings": False, "batch_size": 8, "prompt": "so: "}
    found = post(http, "/api/v1/embed", input=["x"], model=MODEL, options=options)
    close(found, native.vectors(["so: x"], normalize=False))


def test_unified_sparse(http: httpx.Client, native: Native) -> None:
    """A list of indices and values per text."""
    found = post(http, "/api/v1/embed_sparse", input=["the of", "that"], model=SPARSE)
    for row, text in zip(found, ["the of", "that"], strict=True):
        assert all(one.keys() == {"index", "value"} for one in row)
        weights = {one["index"]: one["value"] for one in row}
        assert weights == pytest.approx(native.weights(text))


def test_unified_rerank(http: httpx.Client, native: Native) -> None:
    """Documents with their scores, best first."""
    body = {"query": TEXTS[0], "documents": DOCUMENTS, "model": MODEL, "top_k": 2}
    found = post(http, "/api/v1/rerank", **body)
    scores = native.scores(TEXTS[0], DOCUMENTS)
    assert found["model"] == MODEL
    assert found["results"] == [
        {"text": DOCUMENTS[index], "score": pytest.approx(scores[index]), "index": index}
        for index in (1, 0)
    ]


def test_unified_models(http: httpx.Client) -> None:
    """The list in both shapes, one model, loading it and unloading it; ids have slashes."""
    listed = http.get("/api/v1/models").json()
    assert listed["object"] == "list"
    assert listed["total"] == len(listed["models"]) == len(listed["data"])
    types = {one["id"]: one["type"] for one in listed["models"]}
    assert types[MODEL] == types["prompted"] == "embeddings"
    assert (types[SPARSE], types["own/cross-encoder"]) == ("sparse-embeddings", "rerank")
    one = http.get(f"/api/v1/models/{SPARSE}").json()
    assert one.items() >= {"id": SPARSE, "name": SPARSE, "loaded": True}.items()
    assert one["type"] == "sparse-embeddings"
    for method in ("POST", "GET"):
        answer = http.request(method, f"/api/v1/models/{SPARSE}/load").json()
        assert answer.keys() == {"status", "message", "model_id", "loaded"}
        assert (answer["status"], answer["model_id"]) == ("success", SPARSE)
        assert answer["loaded"] is True


def test_unified_unload(http: httpx.Client) -> None:
    """What is unloaded is loaded again when it is wanted."""
    path = "/api/v1/models/own/cross-encoder"
    gone = post(http, f"{path}/unload")
    assert (gone["status"], gone["loaded"]) == ("success", False)
    assert http.get(path).json()["loaded"] is False
    assert post(http, f"{path}/load")["loaded"] is True
    assert http.get(path).json()["loaded"] is True


def test_unified_pages(http: httpx.Client) -> None:
    """The root, `/info` and `/docs`."""
    root = http.get("/").json()
    assert root.keys() >= {"message", "version"}
    assert root["docs_url"] == "/swagger-ui"
    info = http.get("/info").json()
    assert info["api"].keys() >= {"name", "version"}
    assert info["models"].keys() >= {"total", "loaded", "preload_complete", "loaded_models"}
    assert info["model_id"] == "prompted"
    docs = http.get("/docs")
    assert docs.is_redirect
    assert docs.headers["location"] == "/swagger-ui"
    assert http.get("/swagger-ui").is_success


def test_fast_embed(http: httpx.Client, native: Native) -> None:
    """One text and several, beside TEI's `/embed`."""
    one = post(http, "/embed", model_name=MODEL, text="Hello, world!")
    assert one.keys() == {
        "embedding", "model_name", "dimension", "text_length", "processing_time_ms",
    }  # fmt: skip
    assert (one["model_name"], one["dimension"], one["text_length"]) == (MODEL, 384, 13)
    close(one["embedding"], native.vectors(["Hello, world!"])[0])
    several = post(http, "/embed/batch", model_name=MODEL, texts=["Hello", "World"])
    assert several.keys() == {
        "embeddings", "model_name", "dimension", "count", "processing_time_ms",
    }  # fmt: skip
    assert (several["model_name"], several["dimension"], several["count"]) == (MODEL, 384, 2)
    close(several["embeddings"], native.vectors(["Hello", "World"]))
    assert several["processing_time_ms"] > 0


def test_fast_models(http: httpx.Client) -> None:
    """The list, and one model whose id has a slash."""
    listed = http.get("/models").json()
    for name in ("required_models", "cached_models", "allowed_models"):
        assert MODEL in listed[name]
    one = http.get(f"/models/{MODEL}").json()
    assert (one["model_name"], one["is_cached"]) == (MODEL, True)
    assert one["load_time"] > 0
    assert one["last_used"] >= one["loaded_at"] > 1.7e9


@pytest.mark.parametrize(
    ("path", "body", "status", "keys"),
    [
        ("/api/v1/embed", {"model": "no/such", "input": "x"}, 404, {"detail"}),
        ("/api/v1/rerank", {"model": MODEL, "query": "x"}, 400, {"detail"}),
        ("/api/v1/models/no/such/load", {}, 404, {"detail"}),
        (
            "/embed",
            {"model_name": "no/such", "text": "x"},
            400,
            {"status_code", "detail", "extra"},
        ),
        ("/embed/batch", {"texts": []}, 400, {"status_code", "detail", "extra"}),
    ],
)
def test_errors(http: httpx.Client, path: str, body: dict, status: int, keys: set[str]) -> None:
    """Each API's own shape."""
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json().keys()) == (status, keys)
    assert answer.json()["detail"]
