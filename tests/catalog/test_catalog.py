"""The catalogue: allow-lists, aliases, own models and what their files say."""

import json
from pathlib import Path

import pytest

from embedding_server.catalog import Catalog, open_catalog
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import read_directory
from embedding_server.core import ModelSpec, Pooling, Task
from embedding_server.errors import SettingsError, StartupError, UnsupportedModel
from embedding_server.settings import DEMO_MODELS, Settings
from tests.tiny import HIDDEN, MAX_TOKENS, POSITIONS, write_model

DEMO, ALIAS = DEMO_MODELS


def spec(name: str, *aliases: str) -> ModelSpec:
    """A spec that nobody loads."""
    return ModelSpec(
        id=name, aliases=aliases, located=Path(), pooling=Pooling.MEAN, max_tokens=8, dimensions=4
    )


def test_aliases_resolve_to_one_model() -> None:
    """Allowing any name of a model allows all of them."""
    catalog = Catalog([spec("a", "b")], {Task.EMBED: ("b",), Task.RERANK: ()})
    assert catalog.resolve("a", Task.EMBED) is catalog.resolve("b", Task.EMBED)
    assert list(catalog.listed[Task.EMBED]) == ["b"]
    assert list(catalog.models) == ["a"]


def test_refusals_say_why() -> None:
    """An unknown model and one of another task get different texts."""
    catalog = Catalog([spec("a"), spec("b")], {Task.EMBED: ("a",), Task.RERANK: ("b",)})
    with pytest.raises(UnsupportedModel, match="Model x is not in the allowed models list"):
        catalog.resolve("x", Task.EMBED)
    with pytest.raises(
        UnsupportedModel, match="Model a is allowed for another task, not for rerank"
    ):
        catalog.resolve("a", Task.RERANK)


def test_star_lists_everything() -> None:
    """`*` allows all that is known."""
    catalog = Catalog([spec("a"), spec("b")], {Task.EMBED: ("*",), Task.RERANK: ()})
    assert list(catalog.listed[Task.EMBED]) == ["a", "b"]


def test_unknown_id_names_the_nearest() -> None:
    """A name that is not known is a start-up error with the nearest known ones."""
    with pytest.raises(SettingsError, match="INFERENCE_ALLOWED_RERANK_MODELS: 'tinny'.*tiny"):
        Catalog([spec("tiny")], {Task.EMBED: ("tiny",), Task.RERANK: ("tinny",)})


def test_demo_has_two_names() -> None:
    """The demo model is listed under both of its names and reranks."""
    catalog = open_catalog(
        Settings(demo=True, allowed_embedding_models=DEMO_MODELS, allowed_rerank_models=(ALIAS,))
    )
    assert catalog.resolve(DEMO, Task.EMBED) is catalog.resolve(ALIAS, Task.RERANK)
    assert len(catalog.models) == 1


def test_directory_is_read(tmp_path: Path) -> None:
    """Pooling, limit, width and prompts come from the files."""
    read = read_directory(write_model(tmp_path / "m", pooling="lasttoken"), "m")
    assert (read.pooling, read.max_tokens, read.dimensions) == (Pooling.LAST, MAX_TOKENS, HIDDEN)
    assert read.prompts == {"query": "the query: ", "document": ""}


def test_limit_falls_back(tmp_path: Path) -> None:
    """Without `max_seq_length` the tokenizer's limit counts, without that the positions."""
    model = write_model(tmp_path / "m")
    (model / "sentence_bert_config.json").unlink()
    tokenizer = model / "tokenizer_config.json"
    for limit, expected in ((48, 48), (1e30, POSITIONS), (512, POSITIONS)):
        tokenizer.write_text(json.dumps({"model_max_length": limit}))
        assert read_directory(model, "m").max_tokens == expected


def test_unusable_directories(tmp_path: Path) -> None:
    """What cannot be served is named with its file."""
    with pytest.raises(ModelFilesError, match=r"config\.json is missing"):
        read_directory(tmp_path, "m")
    model = write_model(tmp_path / "m", pooling="max_tokens")
    with pytest.raises(ModelFilesError, match="1_Pooling/config.json: pooling"):
        read_directory(model, "m")
    (model / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Router"}])
    )
    with pytest.raises(ModelFilesError, match="Router is not supported"):
        read_directory(model, "m")
    (model / "modules.json").write_text("[")
    with pytest.raises(ModelFilesError, match=r"modules\.json"):
        read_directory(model, "m")


def test_model_path_errors(tmp_path: Path) -> None:
    """A missing directory names the variable, an unusable model its file."""
    missing = tmp_path / "nowhere"
    with pytest.raises(SettingsError, match="INFERENCE_MODEL_PATH=.*nowhere"):
        open_catalog(Settings(allowed_embedding_models=("m",), model_path=missing))
    (tmp_path / "models" / "m").mkdir(parents=True)
    with pytest.raises(StartupError, match=r"config\.json is missing"):
        open_catalog(Settings(allowed_embedding_models=("m",), model_path=tmp_path / "models"))


def test_foreign_directories_are_passed_over(tmp_path: Path) -> None:
    """A directory that nobody named and that holds no model stops nothing."""
    write_model(tmp_path / "good")
    (tmp_path / "lost+found").mkdir()
    catalog = open_catalog(Settings(allowed_embedding_models=("*",), model_path=tmp_path))
    assert [spec.id for spec in catalog.models.values() if spec.located] == ["good"]


def test_incomplete_config(tmp_path: Path) -> None:
    """A config.json without a needed field is named."""
    model = write_model(tmp_path / "m")
    (model / "config.json").write_text('{"max_position_embeddings": 8}')
    with pytest.raises(ModelFilesError, match="lack 'hidden_size'"):
        read_directory(model, "m")
