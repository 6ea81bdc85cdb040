"""The API of text-embeddings-inference in process: answers, headers, options, default models."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from embedding_server import __version__
from tests.api.dialects import failure, native, post, refusal, same, write_kinds
from tests.conftest import Client, Serve
from tests.tiny import HIDDEN, MAX_TOKENS, write_model

TEXTS = ["the and of that", "a", "", "to be on the"]
LONG = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)


@pytest_asyncio.fixture
async def client(serve: Serve) -> AsyncIterator[Client]:
    """A client of an application whose default model is `tiny`."""
    async with serve(default_model=("tiny",)) as client:
        yield client


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, Any]:
    """Settings that serve models of many kinds, one of each."""
    return write_kinds(tmp_path / "own") | {"allowed_rerank_models": ("cross",)}


async def pieces(client: Client, *texts: str, **options: Any) -> list[list[dict[str, Any]]]:
    """Their tokens."""
    body = {"inputs": list(texts), **options}
    found: list[list[dict[str, Any]]] = await post(client, "/tokenize", **body)
    return found


async def ids_of(client: Client, text: str) -> list[int]:
    """Of a text, with special tokens."""
    return [piece["id"] for piece in (await pieces(client, text))[0]]


@pytest.mark.parametrize("path", ["/embed", "/"])
async def test_embed(client: Client, path: str) -> None:
    """Bare arrays of the native vectors, of one text or several, raw or cut if wanted."""
    same(await post(client, path, inputs=TEXTS, colour="red"), await native(client, *TEXTS))
    same(await post(client, path, inputs=TEXTS[0]), await native(client, TEXTS[0]))
    for options in ({"normalize": False}, {"dimensions": 8}, {"normalize": False, "dimensions": 3}):
        expected = await native(client, *TEXTS, **options)
        same(await post(client, path, inputs=TEXTS, **options), expected)
    nulls = dict.fromkeys(("truncate", "prompt_name", "dimensions"))
    same(await post(client, path, inputs=TEXTS, **nulls), await native(client, *TEXTS))
    assert await post(client, path, inputs=[]) == []


async def test_headers(client: Client) -> None:
    """Times are whole milliseconds, counts are of characters and of real tokens."""
    answer = await client.post("/embed", json={"inputs": TEXTS})
    for name in ("total", "tokenization", "queue", "inference"):
        assert 0 <= int(answer.headers[f"x-{name}-time"]) < 10_000
    used = [len(found) for found in await pieces(client, *TEXTS)]
    assert answer.headers["x-compute-tokens"] == str(sum(used))
    assert answer.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))
    body = {"query": "the", "texts": ["a", "of"]}
    answer = await client.post("/rerank", json=body)
    assert answer.headers["x-compute-characters"] == "6"
    # The query's prompt counts: "the query: the" and its special tokens.
    (query,) = await pieces(client, "the", prompt_name="query")
    assert answer.headers["x-compute-tokens"] == str(len(query) + 3 + 3)
    cut = await client.post("/embed", json={"inputs": LONG})
    assert (cut.headers["x-truncated-inputs"], cut.headers["x-compute-tokens"]) == ("1", "32")


async def test_truncation(client: Client) -> None:
    """The end or, with `Left`, the beginning of a long text is cut off, or it is refused."""
    ids = await ids_of(client, LONG)
    assert len(ids) == 54
    first, *middle, last = ids
    kept = {"Right": middle[:30], "Left": middle[-30:]}
    for direction, some in kept.items():
        for name in (direction, direction.lower()):
            found = await post(client, "/embed", inputs=LONG, truncation_direction=name)
            assert found == await post(client, "/embed", inputs=[[first, *some, last]])
            long_ids = await post(client, "/embed", inputs=[ids], truncation_direction=name)
            assert found == long_ids
    body = {"inputs": ["a", LONG], "truncate": False}
    for path in ("/embed", "/"):
        assert "text 1 has more than 32 tokens" in await refusal(client, "tei", path, **body)


async def test_token_ids(client: Client) -> None:
    """Ids of a text or of several, with special tokens or without, give the texts' vectors."""
    rows = await native(client, TEXTS[0])
    ids = await ids_of(client, TEXTS[0])
    for given in (ids, [ids], [ids[1:-1]], ids[1:-1]):
        same(await post(client, "/embed", inputs=given), rows)
    assert "mixes" in await refusal(client, "tei", "/embed", inputs=["a", 1])
    assert "token id 999" in await refusal(client, "tei", "/embed", inputs=[[1, 999]])
    body = {"inputs": [ids], "prompt_name": "query"}
    assert "a prompt does not go before" in await refusal(client, "tei", "/embed", **body)


async def test_prompts_by_name(client: Client) -> None:
    """One of the model's own, for vectors and for tokens; another name is refused."""
    with_prompt = await native(client, "the query: a")
    same(await post(client, "/embed", inputs="a", prompt_name="query"), with_prompt)
    same(
        await post(client, "/embed", inputs="a", prompt_name="document"), await native(client, "a")
    )
    told = await pieces(client, "a", prompt_name="query")
    assert told == await pieces(client, "the query: a")
    for path in ("/embed", "/tokenize", "/"):
        wrong = await refusal(client, "tei", path, inputs="a", prompt_name="nope")
        assert "prompts of tiny: query, document" in wrong


async def test_tokenize_and_decode(client: Client) -> None:
    """Tokens have their place in the text; decoding gives the text, special tokens if wanted."""
    assert await pieces(client, "Of a") == [
        [
            {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None},
            {"id": 6, "text": "Of", "special": False, "start": 0, "stop": 2},
            {"id": 18, "text": "a", "special": False, "start": 3, "stop": 4},
            {"id": 3, "text": "[SEP]", "special": True, "start": None, "stop": None},
        ]
    ]
    bare = await pieces(client, "Of a", "", add_special_tokens=False)
    assert [[piece["id"] for piece in one] for one in bare] == [[6, 18], []]
    assert await post(client, "/decode", ids=[6, 18]) == ["of a"]
    assert await post(client, "/decode", ids=[]) == await post(client, "/tokenize", inputs=[]) == []
    assert "token id 999" in await refusal(client, "tei", "/decode", ids=[999])
    assert "mixes" in await refusal(client, "tei", "/decode", ids=[1, [2]])


async def test_special_tokens_of_ids(serve: Serve, tmp_path: Path) -> None:
    """They are left out of the text unless wanted."""
    path = write_model(tmp_path / "special") / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.save(str(path))
    lists: dict[str, Any] = {"allowed_rerank_models": ()}
    lists["allowed_embedding_models"] = ("special",)
    async with serve(model_path=tmp_path, **lists) as client:
        ids = [[2, 6, 3], [18]]
        assert await post(client, "/decode", ids=ids) == ["of", "a"]
        whole = await post(client, "/decode", ids=ids, skip_special_tokens=False)
        assert whole == ["[CLS] of [SEP]", "a"]


async def test_similarity(client: Client) -> None:
    """Cosines of the source with each sentence, by the parameters."""
    given: dict[str, Any] = {"source_sentence": "a", "sentences": ["a", "the of", "that is it"]}
    for path in ("/similarity", "/"):
        for parameters in ({}, {"parameters": None}, {"parameters": {"prompt_name": "query"}}):
            prompt = "the query: " * bool(parameters.get("parameters"))
            rows = await native(client, *(prompt + one for one in ("a", *given["sentences"])))
            found = await post(client, path, inputs=given, **parameters)
            assert found == pytest.approx(list(rows[1:] @ rows[0]), abs=1e-6)
        assert await post(client, path, inputs=given | {"sentences": []}) == []
        wrong = given | {"sentences": ["a"] * 1001}
        assert "1001 documents" in await refusal(client, "tei", path, inputs=wrong)


@pytest.mark.parametrize("path", ["/rerank", "/"])
async def test_rerank(serve: Serve, kinds: dict[str, Any], path: str) -> None:
    """Best first, as probabilities or raw scores, with the texts if wanted."""
    texts = ["the of", "a b c", "", LONG]
    async with serve(**kinds) as client:
        body = {"model": "cross", "query": "of", "documents": texts}
        expected = (await post(client, "/api/rerank", **body))["results"]
        body = {"query": "of", "texts": texts}
        raw = await post(client, path, **body, raw_scores=True, return_text=True)
        assert raw == [{key: one[key] for key in ("index", "score", "text")} for one in expected]
        found = await post(client, path, **body, truncate=None)
        assert [set(one) for one in found] == [{"index", "score"}] * 4
        scores = np.array([one["score"] for one in raw])
        assert np.abs([one["score"] for one in found] - 1 / (1 + np.exp(-scores))).max() < 1e-6
        left = await post(client, path, **body, truncation_direction="Left", return_text=True)
        by_text = {one["text"]: one["score"] for one in left}
        right = {texts[one["index"]]: one["score"] for one in found}
        assert {text for text in texts if by_text[text] != right[text]} == {LONG}
        assert await post(client, path, query="of", texts=[]) == []
        wrong = await refusal(client, "tei", path, **body, truncate=False)
        assert "the query with document 3 has more than 32 tokens" in wrong
        many = {"query": "a", "texts": ["b"] * 1001}
        assert "1001 documents" in await refusal(client, "tei", path, **many)


async def test_root_wants_something(client: Client) -> None:
    """What fits none of the three requests is refused in TEI's shape."""
    for body in ({}, {"query": "a"}, {"texts": ["a"]}):
        assert "inputs, or query and texts" in await refusal(client, "tei", "/", **body)


async def test_other_kinds(serve: Serve, kinds: dict[str, Any]) -> None:
    """Sparse weights and vectors of tokens come of the models that make them."""
    texts = ["the of that", "was it"]
    async with serve(**kinds) as client:
        sparse = await post(client, "/embed_sparse", inputs=texts)
        expected = await post(client, "/api/embed/sparse", model="sparse", input=texts)
        for found, one in zip(sparse, expected["embeddings"], strict=True):
            pairs = zip(one["indices"], one["values"], strict=True)
            assert found == [{"index": index, "value": value} for index, value in pairs]
        late = await post(client, "/embed_all", inputs=texts)
        body = {"model": "late", "input": texts, "output": "tokens"}
        assert late == (await post(client, "/api/embed", **body))["embeddings"]
        same(await post(client, "/embed", inputs=texts), await native(client, *texts))
        for path in ("/embed_sparse", "/embed_all"):
            assert await post(client, path, inputs=[]) == []
            answer = await client.post(path, json={"inputs": "a"})
            assert int(answer.headers["x-total-time"]) >= 0
            long = {"inputs": LONG, "truncate": False}
            assert "more than" in await refusal(client, "tei", path, **long)
        # Of several models that embed, the one is meant that `/embed` uses.
        assert len(await pieces(client, "a")) == 1
        assert (await client.get("/info")).json()["model_id"] == "tiny"
    async with serve(**kinds | {"allowed_embedding_models": ("late", "sparse")}) as client:
        assert "several models" in await refusal(client, "tei", "/tokenize", inputs="a")


async def test_which_model(serve: Serve, kinds: dict[str, Any]) -> None:
    """The default of its task and kind, or the only one; otherwise the setting is named."""
    async with serve() as client:
        said = "several models serve this: name one in INFERENCE_DEFAULT_MODEL"
        for path in ("/embed", "/tokenize"):
            assert said in await refusal(client, "tei", path, inputs="a")
        assert len(await post(client, "/rerank", query="a", texts=["b"])) == 1
        body = {"inputs": "a"}
        assert "no allowed model serves" in await refusal(client, "tei", "/embed_sparse", **body)
        assert (await client.get("/info")).json()["model_id"] is None
    lists: dict[str, Any] = {"allowed_rerank_models": ("tiny", "cross")}
    async with serve(**kinds | lists, default_model=("cross", "sparse")) as client:
        assert len(await post(client, "/embed_sparse", inputs="a")) == 1
        assert len((await post(client, "/embed", inputs="a"))[0]) == HIDDEN
        raw = await post(client, "/rerank", query="a", texts=["b"], raw_scores=True)
        ranked = await post(client, "/api/rerank", model="cross", query="a", documents=["b"])
        assert raw[0]["score"] == ranked["results"][0]["score"]
    lists = {"allowed_embedding_models": (), "allowed_rerank_models": ("cross",)}
    async with serve(**kinds | lists) as client:
        assert len((await pieces(client, "a"))[0]) == 3
        assert "reranker" in (await client.get("/info")).json()["model_type"]


async def test_limits(serve: Serve) -> None:
    """32 inputs are allowed whatever the native limit is; one more is refused."""
    async with serve(default_model=("tiny",), max_batch_size=8) as client:
        assert len(await post(client, "/embed", inputs=["a"] * 32)) == 32
        for path in ("/embed", "/tokenize", "/"):
            wrong = await refusal(client, "tei", path, inputs=["a"] * 33)
            assert "Batch size 33 exceeds maximum 32" in wrong
        wrong = await refusal(client, "tei", "/decode", ids=[[4]] * 33)
        assert "Batch size 33 exceeds maximum 32" in wrong
        assert (await client.get("/info")).json()["max_client_batch_size"] == 32


async def test_info(client: Client) -> None:
    """TEI's fields of the default model, and the unified API's."""
    info = (await client.get("/info")).json()
    api, models = info.pop("api"), info.pop("models")
    assert info == {
        "model_id": "tiny",
        "model_sha": None,
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": "mean"}},
        "max_input_length": MAX_TOKENS,
        "max_concurrent_requests": info["max_concurrent_requests"],
        "max_batch_tokens": None,
        "max_client_batch_size": 128,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
    }
    assert info["max_concurrent_requests"] > 0
    assert api == {"name": "embedding-server", "version": __version__}
    assert models.pop("loaded_models") in (["tiny", "other"], ["other", "tiny"])
    assert models == {"total": 2, "loaded": 2, "preload_complete": True}


async def test_wrong_options(client: Client) -> None:
    """They are named."""
    for change, said in (
        ({"truncation_direction": "Middle"}, "$.truncation_direction"),
        ({"normalize": "yes"}, "$.normalize"),
        ({"dimensions": 0}, "$.dimensions"),
        ({"dimensions": HIDDEN + 1}, f"from 1 to {HIDDEN}"),
    ):
        assert said in await refusal(client, "tei", "/embed", inputs="a", **change)
    answer = await client.post("/embed_all", json={"inputs": 1})
    assert "$.inputs" in failure("tei", answer, "request")
