"""The fast embedding API in process: one text, several, and the path that it shares with TEI."""

from pathlib import Path
from typing import Any

from tests.api.dialects import failure, native, post, refusal, same
from tests.conftest import Client, Serve
from tests.tiny import HIDDEN

TEXTS = ["the and of that", "a", "", "to be on the"]
BATCH = "/embed/batch"


async def test_one_text(client: Client) -> None:
    """The native vector, with the length of the text in characters."""
    answer = await post(client, "/embed", model_name="tiny", text="the öf", colour="red")
    (row,) = await native(client, "the öf")
    same(answer.pop("embedding"), row)
    assert 0 < answer.pop("processing_time_ms") < 10_000
    assert answer == {"model_name": "tiny", "dimension": HIDDEN, "text_length": 6}
    assert (await post(client, "/embed", model_name="tiny", text=""))["text_length"] == 0


async def test_several(client: Client) -> None:
    """One native vector per text, in order; none for none."""
    answer = await post(client, BATCH, model_name="tiny", texts=TEXTS)
    same(answer.pop("embeddings"), await native(client, *TEXTS))
    assert 0 < answer.pop("processing_time_ms") < 10_000
    assert answer == {"model_name": "tiny", "dimension": HIDDEN, "count": 4}
    nothing = await post(client, BATCH, model_name="tiny", texts=[])
    assert (nothing["embeddings"], nothing["count"]) == ([], 0)
    wrong = await refusal(client, "fast", BATCH, model_name="tiny", texts=["a"] * 129)
    assert "Batch size 129 exceeds maximum 128" in wrong


async def test_headers(client: Client) -> None:
    """The usual ones, on both paths."""
    bodies: dict[str, dict[str, Any]] = {"/embed": {"text": "the " * 50}}
    bodies[BATCH] = {"texts": ["the " * 50, "a"]}
    for path, body in bodies.items():
        answer = await client.post(path, json={"model_name": "tiny", **body})
        assert answer.headers["x-truncated-inputs"] == "1"
        assert answer.headers["x-queue-depth"] == "0"
        assert answer.headers["x-model-fingerprint"]


async def test_the_body_decides(serve: Serve) -> None:
    """`inputs` is TEI's request and `model_name` this API's, in what is wrong with it, too."""
    async with serve(default_model=("other",)) as client:
        rows = await native(client, "a", model="other")
        same(await post(client, "/embed", inputs="a"), rows)
        same(await post(client, "/embed", inputs="a", model_name="tiny"), rows)
        answer = await post(client, "/embed", model_name="tiny", text="a")
        same([answer["embedding"]], await native(client, "a"))
        said = "give inputs, or model_name and text"
        alone = await refusal(client, "fast", "/embed", model_name="tiny")
        assert alone == "Bad request: give model_name and text"
        for body in ({}, {"text": "a"}):
            assert said in await refusal(client, "tei", "/embed", **body)


async def test_names_with_slashes(serve: Serve, tmp_path: Path) -> None:
    """They are echoed, and have a card below the list."""
    (tmp_path / "models.yaml").write_text("models:\n  org/tiny: {name: tiny}\n")
    async with serve(model_config=tmp_path / "models.yaml") as client:
        answer = await post(client, BATCH, model_name="org/tiny", texts=["a"])
        assert answer["model_name"] == "org/tiny"
        card = (await client.get("/models/org/tiny")).json()
        assert (card["model_name"], card["is_cached"]) == ("org/tiny", True)
        assert card["load_time"] > 0
        assert card["loaded_at"] <= card["last_used"]
        lists = (await client.get("/models")).json()
        assert sorted(lists["required_models"]) == sorted(lists["cached_models"])
        assert sorted(lists["cached_models"]) == ["other", "tiny"]
        assert lists["allowed_models"] == ["org/tiny", "other", "tiny"]


async def test_models_that_make_other_vectors(serve: Serve) -> None:
    """An unknown model is a 400 here, as everything that is wrong with a request."""
    lists: dict[str, Any] = {"allowed_embedding_models": ("other",)}
    async with serve(**lists) as client:
        for name, said in (("tiny", "another task"), ("nope", "not in the allowed models list")):
            answer = await client.post(BATCH, json={"model_name": name, "texts": []})
            assert said in failure("fast", answer, 400)
