"""The OpenAI dialect in process, over tiny models: answers, options, model lists, errors."""

import asyncio
import base64
import gzip
import json
import time
from typing import Any

import numpy as np
import pytest

from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN, MAX_TOKENS

PATH = "/v1/embeddings"
BODY: dict[str, Any] = {"model": "tiny", "input": "the and of that"}
TEXTS = ["the and of that", "a", "", "to be on the"]


async def embed(client: Client, path: str = PATH, **body: Any) -> Any:
    """The parsed answer of a successful request."""
    answer = await client.post(path, json=BODY | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def floats(answer: Any) -> Any:
    """The vectors of an answer in floats."""
    return np.array([one["embedding"] for one in answer["data"]], np.float32)


def failure(answer: Any, status: int, kind: str, code: str | None) -> str:
    """The message of an error after a check of everything else in it."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    ((key, error),) = answer.json().items()
    assert (key, error["type"], error["code"]) == ("error", kind, code)
    assert error["param"] == ("model" if code == "model_not_found" else None)
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


async def test_one_text(client: Client) -> None:
    """The answer has OpenAI's fields in OpenAI's order, on all of its paths."""
    answer = await embed(client, user="somebody", colour="red")
    (vector,) = floats(answer)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": answer["data"][0]["embedding"]}
        ],
        "model": "tiny",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }  # fmt: skip
    assert list(answer) == ["object", "data", "model", "usage"]
    for path in ("/api/v1/embeddings", "/embeddings"):
        assert await embed(client, path) == answer
    assert await embed(client, input=[BODY["input"]]) == answer


async def test_the_native_vectors_in_order(client: Client) -> None:
    """Several texts have the native API's vectors, their index, and their tokens summed."""
    answer = await embed(client, input=TEXTS)
    native = await client.post("/api/embed", json={"model": "tiny", "input": TEXTS})
    assert np.array_equal(floats(answer), np.array(native.json()["embeddings"], np.float32))
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    alone = [(await embed(client, input=text))["usage"]["total_tokens"] for text in TEXTS]
    assert answer["usage"] == {"prompt_tokens": sum(alone), "total_tokens": sum(alone)}


@pytest.mark.parametrize("dimensions", [None, 8])
async def test_base64_has_the_bits_of_floats(client: Client, dimensions: int | None) -> None:
    """base64 is the little-endian float32 of the floats, bit by bit; null is float."""
    answer = await embed(client, input=TEXTS, dimensions=dimensions, encoding_format="base64")
    coded = [base64.b64decode(one.pop("embedding"), validate=True) for one in answer["data"]]
    plain = await embed(client, input=TEXTS, dimensions=dimensions, encoding_format="float")
    assert plain == await embed(client, input=TEXTS, dimensions=dimensions, encoding_format=None)
    assert coded == [row.astype("<f4").tobytes() for row in floats(plain)]
    for one in plain["data"]:
        del one["embedding"]
    assert answer == plain


async def test_dimensions_are_cut_then_normalised(client: Client) -> None:
    """A shorter vector is the beginning of the long one, scaled to length 1."""
    whole = floats(await embed(client, input=TEXTS))[:, :8]
    cut = floats(await embed(client, input=TEXTS, dimensions=8))
    assert cut == pytest.approx(whole / np.linalg.norm(whole, axis=1, keepdims=True), abs=1e-6)


async def test_empty_list(client: Client) -> None:
    """No texts are an empty answer, after the model check."""
    assert await embed(client, input=[]) == {
        "object": "list", "data": [], "model": "tiny",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }  # fmt: skip
    answer = await client.post(PATH, json={"model": "nope", "input": []})
    failure(answer, 404, "invalid_request_error", "model_not_found")


async def test_headers(client: Client) -> None:
    """Answers carry the fingerprint, the queue's numbers and how many texts were cut."""
    long = "the " * 100
    answer = await client.post(PATH, json=BODY | {"input": [long, "a", long]})
    assert answer.json()["usage"]["prompt_tokens"] == 2 * MAX_TOKENS + 3
    assert answer.headers["x-truncated-inputs"] == "2"
    assert answer.headers["x-queue-capacity"] == "1024"
    native = await client.post("/api/embed", json={"model": "tiny", "text": "a"})
    name = "x-model-fingerprint"
    assert answer.headers[name] == native.headers[name]
    assert answer.headers["content-type"] == "application/json"


async def test_compression(serve: Serve) -> None:
    """Where answers may be compressed, these are too."""
    async with serve(compress=True) as client:
        body = BODY | {"input": TEXTS * 5}
        answer = await client.post(PATH, json=body)
        assert answer.headers["content-encoding"] == "gzip"
        assert len(answer.json()["data"]) == 20


async def test_number_of_inputs(client: Client) -> None:
    """2,048 inputs are allowed whatever the native limit is, one more is refused."""
    answer = await embed(client, input=["a"] * 2048, dimensions=1)
    assert [one["index"] for one in answer["data"]] == list(range(2048))
    answer = await client.post(PATH, json=BODY | {"input": ["a"] * 2049})
    message = failure(answer, 400, "invalid_request_error", None)
    assert "Batch size 2049 exceeds maximum 2048" in message


async def test_higher_limit(serve: Serve) -> None:
    """`INFERENCE_MAX_BATCH_SIZE` over 2,048 holds here too."""
    async with serve(max_batch_size=2049) as client:
        assert len((await embed(client, input=["a"] * 2049))["data"]) == 2049


async def test_token_ids(client: Client) -> None:
    """Ids of a text, with the special tokens around them or not, give the text's vector."""
    tokens = {"model": "tiny", "text": BODY["input"]}
    ids = [2, *(await client.post("/v1/tokenize", json=tokens)).json()["tokens"], 3]
    text = await embed(client)
    for given in (ids, [ids], [ids[1:-1]], ids[1:-1]):
        assert await embed(client, input=given) == text
    mixed = await embed(client, input=["a", ids])
    assert np.allclose(floats(mixed)[1], floats(text)[0], atol=1e-6)
    assert (await embed(client, input=[[]]))["usage"]["prompt_tokens"] == 2
    for given, said in (([1, "a"], "mixes"), ([10**6], "token id 1000000"), ([-1], "token id -1")):
        answer = await client.post(PATH, json=BODY | {"input": given})
        assert said in failure(answer, 400, "invalid_request_error", None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": None}, "$.input"),
        ({"input": [1.5]}, "$.input[0]"),
        ({"input": {"text": "a"}}, "$.input"),
        ({"model": 1}, "$.model"),
        ({"dimensions": 0}, ">= 1"),
        ({"dimensions": HIDDEN + 1}, f"from 1 to {HIDDEN}"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
async def test_bad_requests(client: Client, change: Any, said: str) -> None:
    """A wrong request is a 400 in OpenAI's shape that says what is wrong."""
    answer = await client.post(PATH, json=BODY | change)
    assert said in failure(answer, 400, "invalid_request_error", None)


async def test_models(client: Client) -> None:
    """The list has every allowed name once, by name, and each can be asked for alone."""
    answer = (await client.get("/v1/models")).json()
    assert answer == (await client.get("/api/v1/models")).json()
    assert answer["object"] == "list"
    created = answer["data"][0]["created"]
    assert 0 <= time.time() - created < 600
    assert [card["id"] for card in answer["data"]] == ["other", "tiny"]
    fields = {
        "object": "model", "created": created, "owned_by": "local",
        "max_model_len": MAX_TOKENS, "dimensions": HIDDEN, "task": "embed",
    }  # fmt: skip
    for card in answer["data"]:
        assert fields.items() <= card.items()
        assert (await client.get(f"/v1/models/{card['id']}")).json() == card
    for name in ("nope", "org/nope", "tiny/more"):
        message = failure(
            await client.get(f"/v1/models/{name}"), 404, "invalid_request_error", "model_not_found"
        )
        assert f"Model {name} is not" in message


async def test_models_of_one_task(serve: Serve) -> None:
    """A model that only reranks says so, and cannot embed."""
    async with serve(allowed_embedding_models=("other",)) as client:
        answer = (await client.get("/v1/models")).json()
        tasks = {card["id"]: card["task"] for card in answer["data"]}
        assert tasks == {"other": "embed", "tiny": "rerank"}
        answer = await client.post(PATH, json=BODY)
        failure(answer, 404, "invalid_request_error", "model_not_found")


async def test_aliases(serve: Serve) -> None:
    """All names of a model are listed, ids with slashes are found, the owner is their front."""
    settings: dict[str, Any] = {
        "demo": True, "allowed_embedding_models": ("*",), "allowed_rerank_models": (),
        "preload": ("tiny",),
    }  # fmt: skip
    async with serve(**settings) as client:
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert names == sorted(set(names))
        spec = parts_of(client).engine.catalog.models["sentence-transformers/all-MiniLM-L6-v2"]
        assert len(spec.names) > 1
        assert {"tiny", *spec.names} <= set(names)
        for name in spec.names:
            for path in (name, name.replace("/", "%2F")):
                card = (await client.get(f"/v1/models/{path}")).json()
                assert (card["id"], card["owned_by"]) == (name, name.rpartition("/")[0] or "local")
                assert (card["dimensions"], card["max_model_len"]) == (384, spec.max_tokens)


async def test_unknown_model(client: Client) -> None:
    """A model that is not allowed is a 404, as at OpenAI, on every path."""
    for path in (PATH, "/api/v1/embeddings", "/embeddings"):
        answer = await client.post(path, json=BODY | {"model": "gpt"})
        message = failure(answer, 404, "invalid_request_error", "model_not_found")
        assert "Model gpt is not in the allowed models list" in message
        assert answer.headers["x-queue-depth"] == "0"


async def test_unknown_paths_and_methods(client: Client) -> None:
    """404 and 405 below OpenAI's prefixes are in its shape, elsewhere in another's."""
    for path in ("/v1", "/v1/nope", "/api/v1/embeddings/nope", "/embeddings/nope"):
        failure(await client.get(path), 404, "invalid_request_error", "unknown_url")
    for path in (PATH, "/api/v1/embeddings", "/embeddings"):
        failure(await client.get(path), 405, "invalid_request_error", "method_not_supported")
    for path in ("/v1x", "/api/v10", "/embeddingsx", "/api"):
        assert (await client.get(path)).json()["code"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"model": ', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'"\xff"', {}, 400),
        (b"", {}, 400),
        (b"no gzip", {"Content-Encoding": "gzip"}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Encoding": "br"}, 415),
        (b" " * 200_000, {}, 413),
        (gzip.compress(b" " * 200_000), {"Content-Encoding": "gzip"}, 413),
    ],
)
async def test_damaged_bodies(
    serve: Serve, content: bytes, headers: dict[str, str], status: int
) -> None:
    """What fails before a handler is called is in OpenAI's shape too."""
    async with serve(max_body_bytes=150_000) as client:
        more = {"Content-Type": "application/json"} | headers
        answer = await client.post(PATH, content=content, headers=more)
        failure(answer, status, "invalid_request_error", None)


class Stuck(FakeSession):
    """A session whose runs wait for `release()`."""

    def __init__(self) -> None:
        super().__init__(width=HIDDEN)
        self.block()


def use(client: Client, session: Any) -> Any:
    """Make `session` compute the vectors of `tiny`."""
    model = parts_of(client).engine.registry.residents["tiny"].model
    assert model is not None
    model.batcher.session = session
    return model


async def test_overload(serve: Serve) -> None:
    """A full line is a 503 with a time to come back."""
    async with serve(max_concurrent_requests=1, max_queue_depth=1) as client:
        session = Stuck()
        use(client, session)
        inside = asyncio.create_task(client.post(PATH, json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        waiting = asyncio.create_task(client.post(PATH, json=BODY))
        while not parts_of(client).engine.queue.depth:
            await asyncio.sleep(0.001)
        refused = await client.post(PATH, json=BODY)
        failure(refused, 503, "server_error", "service_unavailable")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
        assert refused.headers["x-queue-depth"] == "1"
        session.release()
        await asyncio.gather(inside, waiting)


async def test_refused_bytes(serve: Serve) -> None:
    """A 503 of the byte budget, before any handler, is in OpenAI's shape too."""
    async with serve(max_queued_bytes=len(json.dumps(BODY)) * 3 // 2) as client:
        session = Stuck()
        use(client, session)
        inside = asyncio.create_task(client.post(PATH, json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        refused = await client.post(PATH, json=BODY)
        failure(refused, 503, "server_error", "service_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        session.release()
        await inside


async def test_client_deadline(client: Client) -> None:
    """`X-Request-Timeout-Ms` passes as a 504; one that is no number is a 400."""
    session = Stuck()
    use(client, session)
    answer = await client.post(PATH, json=BODY, headers={"X-Request-Timeout-Ms": "20"})
    failure(answer, 504, "server_error", None)
    answer = await client.post(PATH, json=BODY, headers={"X-Request-Timeout-Ms": "soon"})
    failure(answer, 400, "invalid_request_error", None)
    session.release()


async def test_failures_of_ours(client: Client) -> None:
    """A failing model and a defect are 500s that leak nothing."""
    model = use(client, FakeSession(width=HIDDEN, poison=2))
    answer = await client.post(PATH, json=BODY)
    assert "poisoned" not in failure(answer, 500, "server_error", None)
    model.estimate = None
    answer = await client.post(PATH, json=BODY)
    assert "NoneType" not in failure(answer, 500, "server_error", None)


async def test_openapi(client: Client) -> None:
    """Every path is described once, with every status it may answer."""
    paths = (await client.get("/api/openapi.json")).json()["paths"]
    statuses = {"200", "400", "401", "404", "405", "408", "413", "415", "429", "500", "503", "504"}
    operations = [paths[path]["post"] for path in (PATH, "/api/v1/embeddings", "/embeddings")]
    for operation in operations:
        assert set(operation["responses"]) == statuses
        for status, response in operation["responses"].items():
            schema = response["content"]["application/json"]["schema"]["$ref"]
            assert schema.endswith("EmbeddingsAnswer" if status == "200" else "FailureBody")
    operations += [paths[path]["get"] for path in ("/v1/models", "/api/v1/models")]
    assert len({operation["operationId"] for operation in operations}) == 5
    (parameter,) = paths["/v1/models/{id}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("id", "path")
