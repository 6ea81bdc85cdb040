"""The unified embedding API in process: answers, options, and what they are worth."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from embedding_server import __version__
from tests.api.dialects import failure, native, post, refusal, same, tokens, write_kinds
from tests.conftest import Client, Serve
from tests.tiny import MAX_TOKENS

TEXTS = ["the and of that", "a", "", "to be on the"]
EMBED, SPARSE, RERANK = "/api/v1/embed", "/api/v1/embed_sparse", "/api/v1/rerank"


@pytest_asyncio.fixture
async def kinds(serve: Serve, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of models of many kinds, one of them with a name of its own with a slash."""
    settings = write_kinds(tmp_path / "own")
    (tmp_path / "models.yaml").write_text("models:\n  org/tiny: {name: tiny}\n")
    async with serve(**settings, model_config=tmp_path / "models.yaml") as client:
        yield client


async def test_embed(client: Client) -> None:
    """Bare arrays of the native vectors, of one text, several, or token ids."""
    same(await post(client, EMBED, model="tiny", input=TEXTS, x=1), await native(client, *TEXTS))
    same(await post(client, EMBED, model="tiny", input="a"), await native(client, "a"))
    ids = await tokens(client, TEXTS[0])
    same(await post(client, EMBED, model="tiny", input=ids), await native(client, TEXTS[0]))
    mixed = await post(client, EMBED, model="tiny", input=["a", ids])
    same(mixed, await native(client, "a", TEXTS[0]))
    assert await post(client, EMBED, model="tiny", input=[]) == []
    answer = await client.post(EMBED, json={"model": "tiny", "input": "the " * 100})
    assert answer.headers["x-truncated-inputs"] == "1"
    assert answer.headers["x-model-fingerprint"]


async def test_options(client: Client) -> None:
    """Raw vectors and a prompt are honoured, a batch size is not needed, nulls are defaults."""
    body: dict[str, Any] = {"model": "tiny", "input": ["a", "of"]}
    raw = await post(client, EMBED, **body, options={"normalize_embeddings": False})
    same(raw, await native(client, "a", "of", normalize=False))
    prompted = await post(client, EMBED, **body, options={"prompt": "the "})
    same(prompted, await native(client, "the a", "the of"))
    nulls = dict.fromkeys(("normalize_embeddings", "batch_size", "prompt", "precision"))
    more = {"batch_size": 1, "precision": "float32", "show_progress_bar": True}
    for options in (None, {}, nulls, more):
        answer = await post(client, EMBED, **body, options=options)
        same(answer, await native(client, "a", "of"))


@pytest.mark.parametrize("path", [EMBED, SPARSE])
async def test_what_is_refused(client: Client, path: str) -> None:
    """Options that cannot be honoured are named; so is the limit."""
    for change, said in (
        ({"options": {"precision": "int8"}}, "$.options.precision"),
        ({"options": {"normalize_embeddings": "no"}}, "$.options.normalize_embeddings"),
        ({"options": {"prompt": "x" * 10_001}}, "more than 10000 characters"),
        ({"input": ["a"] * 129}, "Batch size 129 exceeds maximum 128"),
        ({"input": ["a", 1]}, "mixes token ids with texts"),
        ({"input": None}, "$.input"),
    ):
        wrong = {"model": "tiny", "input": "a", **change}
        assert said in await refusal(client, "unified", path, **wrong)


async def test_sparse(kinds: Client) -> None:
    """Pairs of index and value, those of the native API; a dense model is refused."""
    texts = ["the of that", "was it"]
    found = await post(kinds, SPARSE, model="sparse", input=texts)
    expected = await post(kinds, "/api/embed/sparse", model="sparse", input=texts)
    for ours, other in zip(found, expected["embeddings"], strict=True):
        pairs = zip(other["indices"], other["values"], strict=True)
        assert ours == [{"index": index, "value": value} for index, value in pairs]
    assert await post(kinds, SPARSE, model="sparse", input=[]) == []
    for path, model, said in ((SPARSE, "tiny", "is dense"), (EMBED, "sparse", "is sparse")):
        answer = await kinds.post(path, json={"model": model, "input": "a"})
        assert said in failure("unified", answer, "model")


@pytest.mark.parametrize("model", ["tiny", "cross", "late"])
async def test_rerank(kinds: Client, model: str) -> None:
    """Texts with raw scores, best first and cut to `top_k`."""
    body: dict[str, Any] = {"model": model, "query": "the of", "documents": TEXTS}
    expected = await post(kinds, "/api/rerank", **body)
    answer = await post(kinds, RERANK, **body)
    assert answer == expected
    assert set(answer["results"][0]) == {"text", "score", "index"}
    for top in (1, 9):
        cut = await post(kinds, RERANK, **body, top_k=top)
        assert cut["results"] == answer["results"][:top]
    nothing = await post(kinds, RERANK, **body | {"documents": []})
    assert nothing == {"results": [], "model": model}
    assert "at least 1, got 0" in await refusal(kinds, "unified", RERANK, **body, top_k=0)
    wrong = body | {"documents": ["a"] * 1001}
    assert "1001 documents" in await refusal(kinds, "unified", RERANK, **wrong)


async def test_names_with_slashes(kinds: Client) -> None:
    """They serve as any other and are echoed; their card is below the list."""
    same(await post(kinds, EMBED, model="org/tiny", input="a"), await native(kinds, "a"))
    answer = await post(kinds, "/api/v1/embeddings", model="org/tiny", input="a")
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("org/tiny", 3)
    card = (await kinds.get("/api/v1/models/org/tiny")).json()
    listed = (await kinds.get("/api/v1/models")).json()
    assert card in listed["models"]
    found = {one["id"]: (one["name"], one["type"], one["loaded"]) for one in listed["models"]}
    types = {"tiny": "embeddings", "org/tiny": "embeddings", "cross": "rerank"}
    types |= {"sparse": "sparse-embeddings", "late": found["late"][1]}
    assert found == {name: (name, kind, True) for name, kind in types.items()}
    assert listed["total"] == len(types)
    assert (listed["object"], listed["data"]) == ("list", listed["models"])
    assert card["max_model_len"] == MAX_TOKENS


async def test_front_page(client: Client) -> None:
    """The root says where the documentation is, and `/docs` leads there."""
    answer = (await client.get("/")).json()
    assert set(answer) == {"message", "version", "docs_url"}
    assert (answer["version"], answer["docs_url"]) == (__version__, "/swagger-ui")
    led = await client.get("/docs")
    assert led.is_redirect
    assert led.headers["location"] == "/swagger-ui"
    assert (await client.get(led.headers["location"])).status_code == 200
