"""Cohere's API in process, and with it Jina's and vLLM's: answers, options, what they refuse."""

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from tests.api.dialects import failure, model_of, native, post, refusal, same, tokens, write_kinds
from tests.api.test_own_kinds import write
from tests.conftest import Client, Serve
from tests.tiny import HIDDEN, MAX_TOKENS, write_model
from tests.zoo import write_clip

TEXTS = ["the and of that", "a", "", "to be on the"]
LONG = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)
V1, V2 = "/v1/embed", "/v2/embed"
FORMS = ["float", "int8", "uint8", "binary", "ubinary", "base64"]


@pytest_asyncio.fixture
async def ranked(serve: Serve, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of an embedder, a cross-encoder and a late-interaction model, which all rank."""
    async with serve(**write_kinds(tmp_path / "own")) as client:
        yield client


async def test_version_1(client: Client) -> None:
    """Floats are the native vectors in Cohere's fields; types are asked for by name."""
    answer = await post(client, V1, model="tiny", texts=TEXTS, colour="red")
    used = sum([len(await tokens(client, text)) + 2 for text in TEXTS])
    same(answer.pop("embeddings"), await native(client, *TEXTS))
    assert len(answer.pop("id")) == 32
    assert answer == {
        "response_type": "embeddings_floats",
        "texts": TEXTS,
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {"input_tokens": used},
            "tokens": {"input_tokens": used},
        },
    }
    typed = await post(client, V1, model="tiny", texts=TEXTS, embedding_types=["float"])
    assert typed["response_type"] == "embeddings_by_type"
    same(typed["embeddings"]["float"], await native(client, *TEXTS))


@pytest.mark.parametrize("dimensions", [None, 12])
async def test_every_type(client: Client, dimensions: int | None) -> None:
    """Each is made of the native floats: bits packed by their sign, bytes by the model's range."""
    body: dict[str, Any] = {"model": "tiny", "texts": TEXTS, "output_dimension": dimensions}
    body |= {"embedding_types": FORMS, "input_type": "classification"}
    answer = await post(client, V2, **body)
    assert answer["response_type"] == "embeddings_by_type"
    found = answer["embeddings"]
    assert list(found) == FORMS
    rows = await native(client, *TEXTS, dimensions=dimensions)
    same(found["float"], rows)
    assert [base64.b64decode(one) for one in found["base64"]] == [one.tobytes() for one in rows]
    calibration = model_of(client).calibration
    assert calibration
    limit = calibration.limit(dimensions or HIDDEN, normalize=True)
    scaled = np.clip(np.rint(rows * np.float32(127 / limit)), -127, 127)
    assert found["int8"] == scaled.astype(int).tolist()
    assert found["uint8"] == (scaled.astype(int) + 128).tolist()
    bits = np.pad(rows > 0, ((0, 0), (0, -rows.shape[1] % 8)))
    packed = bits.reshape(len(TEXTS), -1, 8) @ (1 << np.arange(7, -1, -1))
    assert found["ubinary"] == packed.tolist()
    assert found["binary"] == (packed - 128).tolist()
    for index, text in enumerate(TEXTS):
        alone = await post(client, V2, **body | {"texts": [text], "embedding_types": ["int8"]})
        assert np.abs(np.subtract(alone["embeddings"]["int8"][0], found["int8"][index])).max() <= 1


async def test_no_texts(client: Client) -> None:
    """An empty list is an empty answer of every type, after the model check."""
    answer = await post(
        client, V2, model="tiny", texts=[], input_type="clustering", embedding_types=FORMS
    )
    assert answer["embeddings"] == {form: [] for form in FORMS}
    assert answer["meta"]["tokens"] == {"input_tokens": 0}
    assert (await post(client, V1, model="tiny", inputs=[]))["embeddings"] == []
    failure("cohere", await client.post(V1, json={"model": "nope", "texts": []}), "model")


async def test_input_types_are_prompts(client: Client) -> None:
    """Searching has the model's own prompts, v2 wants to be told, other types have none here."""
    plain = await native(client, "a b", "the query: a b")
    for path in (V1, V2):
        body = {"model": "tiny", "texts": ["a b"], "embedding_types": ["float"]}
        for wanted, row in (("search_query", 1), ("search_document", 0), ("clustering", 0)):
            answer = await post(client, path, **body, input_type=wanted)
            assert np.abs(answer["embeddings"]["float"][0] - plain[row]).max() < 1e-6
    same((await post(client, V1, **body))["embeddings"]["float"], await native(client, "a b"))
    assert "input_type is required" in await refusal(client, "cohere", V2, **body)
    assert "input_type" in await refusal(client, "cohere", V1, **body, input_type="passage")


async def test_models_without_prompts_need_no_input_type(serve: Serve, tmp_path: Path) -> None:
    """There v2 takes texts alone; a prompt of another name is an input type's too."""
    (tmp_path / "own").mkdir()
    write_model(tmp_path / "own" / "plain")
    (tmp_path / "own" / "plain" / "config_sentence_transformers.json").unlink()
    config = tmp_path / "models.yaml"
    config.write_text('models:\n  sorts: {name: tiny, prompts: {classification: "you that "}}\n')
    settings: dict[str, Any] = {"allowed_embedding_models": (), "allowed_rerank_models": ()}
    async with serve(model_config=config, **settings) as client:
        for wanted, text in (("classification", "you that a"), ("search_query", "a")):
            answer = await post(client, V2, model="sorts", texts=["a"], input_type=wanted)
            same(answer["embeddings"]["float"], await native(client, text, model="sorts"))
    settings = {"allowed_embedding_models": ("plain",), "allowed_rerank_models": ()}
    async with serve(model_path=tmp_path / "own", **settings) as client:
        answer = await post(client, V2, model="plain", texts=["a"])
        same(answer["embeddings"]["float"], await native(client, "a", model="plain"))
        assert await post(client, V2, texts=["a"]) | {"id": ""} == answer | {"id": ""}


async def test_truncation(client: Client) -> None:
    """END keeps the first tokens, START the last ones, NONE refuses and names the text."""
    ids = await tokens(client, LONG)
    room = MAX_TOKENS - 2
    for truncate, kept in ((None, ids[:room]), ("END", ids[:room]), ("START", ids[-room:])):
        body = {"model": "tiny", "texts": [LONG]} | ({"truncate": truncate} if truncate else {})
        answer = await client.post(V1, json=body)
        assert answer.headers["x-truncated-inputs"] == "1"
        assert answer.json()["meta"]["tokens"]["input_tokens"] == MAX_TOKENS
        expected = await post(client, "/api/embed", model="tiny", input=kept)
        assert answer.json()["embeddings"] == expected["embeddings"]
    body = {"model": "tiny", "texts": ["a", LONG], "truncate": "NONE"}
    assert "text 1 has more than 32 tokens" in await refusal(client, "cohere", V1, **body)


async def test_inputs_of_parts(client: Client) -> None:
    """A text may come in parts; a part must have what its type says."""
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "of"}]
    inputs = [{"content": parts}, {"content": [{"type": "text", "text": "a"}]}]
    answer = await post(client, V2, model="tiny", inputs=inputs, input_type="clustering")
    same(answer["embeddings"]["float"], await native(client, "the of", "a"))
    assert answer["texts"] == ["the of", "a"]
    wrong: list[dict[str, Any]] = [
        {"type": "text"},
        {"type": "image_url"},
        {"type": "image_url", "image_url": "data:"},
        {"type": "video"},
    ]
    for part in wrong:
        body = {"model": "tiny", "inputs": [{"content": [part]}], "input_type": "clustering"}
        assert "$.inputs[0].content[0]" in await refusal(client, "cohere", V2, **body)


async def test_images(serve: Serve, tmp_path: Path) -> None:
    """Images as data URIs have the native vectors and, like texts, every type."""
    write_clip(tmp_path / "clip")
    write(tmp_path / "clip" / "config.json", {"projection_dim": 512})
    write_model(tmp_path / "tiny")
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (10, 200, 30)).save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    names = ("clip", "tiny")
    async with serve(
        model_path=tmp_path, allowed_embedding_models=names, allowed_rerank_models=()
    ) as client:
        expected = await post(client, "/api/embed/image", model="clip", image=uri)
        rows = np.array(expected["embeddings"], np.float32)
        body: dict[str, Any] = {"model": "clip", "input_type": "image", "embedding_types": FORMS}
        image = {"content": [{"type": "image_url", "image_url": {"url": uri}}]}
        for given in ({"images": [uri]}, {"inputs": [image]}):
            answer = await post(client, V2, **body, **given)
            same(answer["embeddings"]["float"], rows)
            assert len(answer["embeddings"]["int8"][0]) == 8 * len(
                answer["embeddings"]["binary"][0]
            )
            assert answer["texts"] == []
        same((await post(client, V2, images=[uri]))["embeddings"]["float"], rows)
        both = [image, {"content": [{"type": "text", "text": "a"}]}]
        assert "mixes" in await refusal(client, "cohere", V2, **body, inputs=both)
        beside = [{"content": [*image["content"], {"type": "text", "text": "a"}]}]
        assert "text beside" in await refusal(client, "cohere", V2, **body, inputs=beside)
        assert "fetched" in await refusal(client, "cohere", V1, model="clip", images=["http://a/b"])
        for model, given in (("tiny", {"images": [uri]}), ("clip", {"texts": ["a"]})):
            answer = await client.post(V1, json={"model": model, **given})
            failure("cohere", answer, "model")


async def test_what_is_refused(client: Client) -> None:
    """Options that no model here honours are named; so are limits."""
    body: dict[str, Any] = {"model": "tiny", "texts": ["a"]}
    for change, said in (
        ({"max_tokens": 5}, "max_tokens is not supported"),
        ({"embedding_types": ["int4"]}, "$.embedding_types[0]"),
        ({"truncate": "MIDDLE"}, "$.truncate"),
        ({"output_dimension": 0}, "$.output_dimension"),
        ({"output_dimension": HIDDEN + 1}, f"from 1 to {HIDDEN}"),
        ({"images": []}, "either texts, inputs or images"),
        ({"texts": None}, "either texts, inputs or images"),
        ({"texts": ["a"] * 129}, "Batch size 129 exceeds maximum 128"),
    ):
        assert said in await refusal(client, "cohere", V1, **body | change)
    assert "several models" in await refusal(client, "cohere", V1, texts=["a"])


async def test_cohere_s_own_limit(serve: Serve) -> None:
    """96 texts are allowed whatever the native limit is."""
    async with serve(max_batch_size=8) as client:
        assert len((await post(client, V1, model="tiny", texts=["a"] * 96))["embeddings"]) == 96
        wrong = await refusal(client, "cohere", V1, model="tiny", texts=["a"] * 97)
        assert "Batch size 97 exceeds maximum 96" in wrong


async def test_tokens_and_text(client: Client) -> None:
    """Tokenize leaves special tokens out, detokenize puts its tokens together."""
    answer = await post(client, "/v1/tokenize", model="tiny", text="the ofa")
    assert answer["token_strings"] == ["the", "of", "a"]
    assert len(answer["tokens"]) == 3
    assert answer["meta"] == {"api_version": {"version": "1"}}
    given = answer["tokens"]
    answer = await post(client, "/v1/detokenize", model="tiny", tokens=given)
    assert answer == {"text": "the of ##a", "meta": {"api_version": {"version": "1"}}}
    assert (await post(client, "/v1/detokenize", model="tiny", tokens=[]))["text"] == ""
    wrong = await refusal(client, "cohere", "/v1/detokenize", model="tiny", tokens=[10**30])
    assert "$.tokens[0]" in wrong or "which is not among" in wrong
    wrong = await refusal(client, "cohere", "/v1/detokenize", model="tiny", tokens=[-1])
    assert "token id -1, which is not among" in wrong
    long = "a" * (64 * MAX_TOKENS + 1)
    assert "at most" in await refusal(client, "cohere", "/v1/tokenize", model="tiny", text=long)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_rerank(ranked: Client, path: str) -> None:
    """Best first with each kind's score: cosines, probabilities of logits, sums of best cosines."""
    documents = ["the of", "a b c", "", "you that is it"]
    body: dict[str, Any] = {"query": "the of a", "documents": documents}
    for model in ("tiny", "cross", "late"):
        raw = await post(ranked, "/api/rerank", **body, model=model)
        answer = await post(ranked, path, **body, model=model)
        results = answer["results"]
        assert [one["index"] for one in results] == [one["index"] for one in raw["results"]]
        scores = np.array([one["score"] for one in raw["results"]])
        expected = 1 / (1 + np.exp(-scores)) if model == "cross" else scores
        assert np.abs([one["relevance_score"] for one in results] - expected).max() < 1e-6
        used = answer["usage"]["total_tokens"]
        assert used == answer["usage"]["prompt_tokens"] > 0
        assert answer["meta"] == {
            "api_version": {"version": path[2]},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": used},
        }
        assert (answer["model"], len(answer["id"])) == (model, 32)
    for top in (1, 3, 9):
        cut = await post(ranked, path, **body, model="late", top_n=top)
        assert cut["results"] == results[:top]
    nothing = await post(ranked, path, model="cross", query="a", documents=[])
    assert (nothing["results"], nothing["usage"]["total_tokens"]) == ([], 0)


async def test_documents_are_sent_back(ranked: Client) -> None:
    """In v1 unless told not to, as at Jina; in v2 if told to; they may come as objects."""
    body = {"model": "tiny", "query": "a", "documents": ["the", {"text": "of", "title": "x"}]}
    for path, default in (("/v1/rerank", True), ("/v2/rerank", False)):
        for wanted in (None, True, False):
            answer = await post(ranked, path, **body, return_documents=wanted)
            for one in answer["results"]:
                shown = {"document": {"text": ("the", "of")[one["index"]]}}
                expected = shown if (default if wanted is None else wanted) else {}
                assert one == expected | {key: one[key] for key in ("index", "relevance_score")}


async def test_max_tokens_per_doc(ranked: Client) -> None:
    """Documents are cut to so many tokens, the query stays whole."""
    query, whole, cut = "the of and to in is it", ["a b c d e", "f g"], ["a b", "f g"]
    for model in ("tiny", "cross", "late"):
        body = {"model": model, "query": query}
        short = await post(ranked, "/v2/rerank", **body, documents=cut)
        answer = await post(ranked, "/v2/rerank", **body, documents=whole, max_tokens_per_doc=2)
        assert answer["usage"] == short["usage"]
        for ours, other in zip(answer["results"], short["results"], strict=True):
            assert abs(ours["relevance_score"] - other["relevance_score"]) < 1e-6


async def test_what_rerank_refuses(ranked: Client) -> None:
    """Options that are not supported are named; so are limits, and a model that has to be said."""
    body: dict[str, Any] = {"model": "tiny", "query": "a", "documents": ["b"]}
    for change, said in (
        ({"top_n": 0}, "$.top_n"),
        ({"max_tokens_per_doc": 0}, "$.max_tokens_per_doc"),
        ({"max_chunks_per_doc": 1}, "max_chunks_per_doc is not supported"),
        ({"rank_fields": ["title"]}, "rank_fields is not supported"),
        ({"documents": ["b"] * 1001}, "1001 documents exceed the maximum of 1000"),
        ({"documents": [{"title": "x"}]}, "$.documents[0]"),
        ({"model": None}, "several models serve this"),
    ):
        assert said in await refusal(ranked, "cohere", "/v1/rerank", **body | change)


async def test_score(ranked: Client) -> None:
    """One text against others or pairs of texts, in the order of the request, as vLLM answers."""
    texts = ["the of", "a b c", "you that"]
    for model in ("tiny", "cross", "late"):
        answer = await post(ranked, "/v1/score", model=model, text_1="a", text_2=texts)
        ranking = await post(ranked, "/v1/rerank", model=model, query="a", documents=texts)
        scores = {one["index"]: one["relevance_score"] for one in ranking["results"]}
        data = [{"object": "score", "index": index, "score": scores[index]} for index in range(3)]
        assert answer == {
            "id": answer["id"],
            "object": "list",
            "created": answer["created"],
            "model": model,
            "data": data,
            "usage": {key: ranking["usage"][key] for key in ("prompt_tokens", "total_tokens")},
        }
        pairs = await post(ranked, "/v1/score", model=model, text_1=texts, text_2=texts[::-1])
        alone = [
            (await post(ranked, "/v1/score", model=model, text_1=one, text_2=other))["data"][0]
            for one, other in zip(texts, texts[::-1], strict=True)
        ]
        found = [one["score"] for one in pairs["data"]]
        assert found == pytest.approx([one["score"] for one in alone], abs=1e-6)
    assert (await post(ranked, "/v1/score", model="tiny", text_1="a", text_2=[]))["data"] == []
    for one, other in ((["a", "b"], ["a"]), ([], ["a"]), ([], [])):
        wrong = await refusal(ranked, "openai", "/v1/score", model="tiny", text_1=one, text_2=other)
        assert "as many as text_2 has" in wrong


async def test_many_pairs_in_a_short_line(serve: Serve) -> None:
    """Pairs of one request are not refused for each other's sake."""
    async with serve(max_concurrent_requests=1, max_queue_depth=0) as client:
        answer = await post(client, "/v1/score", model="tiny", text_1=["a"] * 5, text_2=["b"] * 5)
        assert len(answer["data"]) == 5


async def test_models_of_other_kinds(serve: Serve, tmp_path: Path) -> None:
    """A sparse model has no place here, and the answer says where it has."""
    async with serve(**write_kinds(tmp_path / "own")) as client:
        answer = await client.post(V1, json={"model": "sparse", "texts": ["a"]})
        assert "/api/embed/sparse" in failure("cohere", answer, "model")
