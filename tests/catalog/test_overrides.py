"""What entries of `INFERENCE_MODEL_CONFIG` make: names, and models of their own."""

from pathlib import Path

import pytest

from embedding_server.catalog import Catalog, Locator, ModelFilesError
from embedding_server.catalog.config import read_config
from embedding_server.catalog.files import Hub
from embedding_server.core import Kind, ModelSpec, Origin, Overrides, Pooling, Precision, Task
from embedding_server.errors import UnsupportedModel
from embedding_server.settings import DEMO_MODELS, Settings
from tests.catalog.entries import BGE, E5, GRAPH, PASSAGE, catalog, mistake, write
from tests.hub import LocalHub
from tests.tiny import HIDDEN, MAX_TOKENS, POSITIONS, export, write_cross_encoder, write_model


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        (("name: BAAI/bge-reranker-base",), 2, "is a cross-encoder model, not for embeddings: its"),
        (("name: BAAI/bge-reranker-base", "type: late-interaction"), 4, "its type is rerank"),
        (("name: prithivida/Splade_PP_en_v1",), 2, "its type is sparse-embeddings"),
        ((f"name: {BGE}", "type: image-embeddings"), 4, "its type is embeddings, rerank"),
        ((f"name: {BGE}", "max_tokens: 513"), 4, "has positions for 512 tokens, not 513"),
        ((f"name: {BGE}", "dimensions: 385"), 4, "gives 384 dimensions, not 385"),
        (("name: BAAI/bge-reranker-base", "type: rerank", "pooling: cls"), 5, "pooling means not"),
        (("name: BAAI/bge-reranker-base", "type: rerank", "dimensions: 1"), 5, "dimensions means"),
        (("name: BAAI/bge-reranker-base", "type: rerank", "prompts: {}"), 5, "prompts means noth"),
        (("name: tiny", f"max_tokens: {POSITIONS + 1}"), 4, f"{POSITIONS} tokens"),
        (("name: tiny", f"dimensions: {HIDDEN + 1}"), 4, f"gives {HIDDEN} dimensions"),
        (("name: jinaai/jina-embeddings-v3", "pooling: cls"), 4, "pooling means nothing for jin"),
        (("name: Qdrant/bm25", "type: sparse-embeddings", "file: x.onnx"), 5, "file means noth"),
        (("name: tiny", "revision: main"), 4, "tiny is here, without revisions"),
        (("name: tiny", "file: onnx/other.onnx"), 4, "there is no "),
        (("name: tiny", "type: rerank", "pooling: cls", "x: 1"), 6, "x is not known"),
        (("name: nothing",), 3, "config.json is missing"),
        (("name: linked", "file: out.onnx"), 3, "outside its directory"),
    ],
)
def test_wishes_that_cannot_be(config: Path, lines: tuple[str, ...], line: int, said: str) -> None:
    """What the model named cannot be is a mistake too, with its line."""
    models = config.parent / "models"
    write_model(models / "tiny")
    (models / "nothing").mkdir()
    export(write_model(models / "linked")).joinpath("out.onnx").symlink_to(config)
    found, text = mistake(config, "a:", *(f"  {one}" for one in lines), model_path=models)
    assert found == line
    assert said in text


def test_a_key_is_one_more_name(config: Path) -> None:
    """Without overrides a key leads to the model itself, loaded once, and is allowed."""
    found = catalog(
        config,
        f"one: {{name: {E5}}}",
        f"two: {{name: {E5}, type: embeddings}}",
        "ranks: {name: BAAI/bge-reranker-v2-m3, type: rerank}",
        allowed_embedding_models=(BGE,),
    )
    spec = found.resolve("one", Task.EMBED)
    assert spec is found.resolve("two", Task.EMBED)
    assert spec is found.resolve(E5, Task.EMBED)
    assert (spec.id, spec.prompts, spec.overrides) == (E5, PASSAGE, Overrides())
    assert found.resolve("ranks", Task.RERANK).id == "rozgo/bge-reranker-v2-m3"
    assert list(found.listed[Task.EMBED]) == [BGE, "one", "two"]
    assert set(found.models) == {BGE, E5, "rozgo/bge-reranker-v2-m3"}
    assert found.spec("two", "INFERENCE_PRELOAD") is spec
    with pytest.raises(UnsupportedModel):
        found.resolve("ranks", Task.EMBED)


def test_a_model_of_its_own(config: Path) -> None:
    """With overrides it is another model, called as the key; the one it is made of stays."""
    found = catalog(
        config,
        f"mine: {{name: {E5}, max_tokens: 128, prompts: {{}}, dimensions: 64, precision: int8,",
        "  pooling: cls, revision: abc, token_ids: refuse, file: onnx/model_O4.onnx}",
        allowed_embedding_models=(E5,),
    )
    mine, plain = found.resolve("mine", Task.EMBED), found.resolve(E5, Task.EMBED)
    assert (mine.id, mine.aliases, mine.max_tokens, mine.prompts) == ("mine", (), 128, {})
    assert (mine.dimensions, mine.width, mine.pooling) == (64, 384, Pooling.CLS)
    assert (mine.precision, mine.token_ids) == (Precision.INT8, "refuse")
    assert mine.origin == Origin(repo=E5, files=("onnx/model_O4.onnx",), revision="abc")
    assert mine.file == "onnx/model_O4.onnx"
    assert (plain.id, plain.dimensions, plain.width, plain.file) == (E5, 384, 384, GRAPH)
    assert set(found.models) == {E5, "mine"}


def test_another_file_brings_its_data(config: Path) -> None:
    """External data is called after its graph; weights need no graph."""
    found = catalog(
        config,
        "half: {name: BAAI/bge-m3, file: onnx/model_fp16.onnx}",
        "whole: {name: BAAI/bge-m3, file: model.safetensors}",
    )
    half, whole = found.models["half"], found.models["whole"]
    assert half.origin
    assert half.origin.files == (
        *("onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data"),
        "onnx/Constant_7_attr__value",
    )
    assert whole.origin
    assert (whole.file, whole.origin.files) == (None, ("model.safetensors",))


def test_a_key_takes_a_name(config: Path) -> None:
    """A key means what its entry says, whatever order they are in and whoever had the name."""
    small, minilm = "BAAI/bge-small-en-v1.5", "Qdrant/all-MiniLM-L6-v2-onnx"
    lines = (
        f"q: {{name: {small}}}",
        f"{small}: {{name: {BGE}}}",
        f"{DEMO_MODELS[0]}: {{name: {minilm}, max_tokens: 99}}",
        f"{E5}: {{name: {E5}, max_tokens: 77}}",
        f"e5: {{name: {E5}}}",
    )
    for order in (lines, lines[::-1]):
        found = catalog(config, *order, allowed_embedding_models=(minilm,))
        files = {name: spec.origin for name, spec in found.listed[Task.EMBED].items()}
        assert files[small] == Origin(repo=BGE, files=(GRAPH,))
        assert files["q"] == Origin(
            repo="Qdrant/bge-small-en-v1.5-onnx-Q", files=("model_optimized.onnx",)
        )
        limits = {name: found.resolve(name, Task.EMBED).max_tokens for name in files}
        assert limits[DEMO_MODELS[0]] == 99
        assert (limits[minilm], limits[E5], limits["e5"]) == (512, 77, 512)
        assert all(spec.id == name for name, spec in found.models.items())
        assert found.find(small) is found.find(BGE)


def test_a_directory_takes_a_published_name(config: Path) -> None:
    """A directory may be served under a published id, and that model under another one."""
    write_model(config.parent / "m")
    lines = (f"{BGE}: {{name: m}}", f"x: {{name: {BGE}}}")
    for order in (lines, lines[::-1]):
        found = catalog(config, *order)
        assert found.resolve(BGE, Task.EMBED).located == config.parent / "m"
        other = found.resolve("x", Task.EMBED)
        assert (other.id, other.origin) == ("x", Origin(repo=BGE, files=(GRAPH,)))


def test_directories(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may lie in the model path, beside the file, or anywhere; twice it is one model."""
    beside, anywhere = config.parent / "beside", config.parent / "any" / "where"
    write_model(config.parent / "models" / "own")
    write_model(beside, pooling="cls_token")
    write_cross_encoder(anywhere)
    monkeypatch.chdir("/")
    found = catalog(
        config,
        "a: {name: own}",
        "b: {name: beside}",
        "c: {name: ./any/../beside}",
        f"d: {{name: {anywhere}, type: rerank}}",
        "e: {name: beside, dimensions: 8}",
        model_path=config.parent / "models",
    )
    assert found.resolve("a", Task.EMBED).id == "own"
    assert found.resolve("b", Task.EMBED) is found.resolve("c", Task.EMBED)
    assert found.resolve("b", Task.EMBED).located == beside
    assert found.resolve("d", Task.RERANK).kind is Kind.CROSS
    cut = found.resolve("e", Task.EMBED)
    assert (cut.located, cut.dimensions, cut.width, cut.pooling) == (beside, 8, HIDDEN, Pooling.CLS)
    assert set(found.models) == {"own", "b", "d", "e"}


def test_what_the_directory_cannot_say(config: Path) -> None:
    """Pooling, limit and file make a directory usable that is not usable without."""
    models = config.parent / "models"
    odd = export(write_model(models / "odd", pooling="max_tokens"), "onnx/model_O4.onnx")
    found = catalog(
        config,
        "odd: {name: odd, pooling: cls, max_tokens: 60, file: onnx/model_O4.onnx}",
        model_path=models,
        allowed_embedding_models=("odd",),
    )
    (spec,) = found.models.values()
    assert (spec.located, spec.file) == (odd, "onnx/model_O4.onnx")
    assert (spec.pooling, spec.max_tokens) == (Pooling.CLS, 60)
    assert mistake(config, "b: {name: odd}", model_path=models)[0] == 2


@pytest.mark.parametrize("limit", [MAX_TOKENS - 1, POSITIONS, POSITIONS + 1])
def test_overrides_survive_the_files(config: Path, limit: int) -> None:
    """Limit and prompts hold when the files come, which say less; positions bound the limit."""
    model = export(write_model(config.parent / "m", hidden=384))
    files = {name: (model / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    files |= {
        name: (model / name).read_bytes()
        for name in (GRAPH, "sentence_bert_config.json", "config_sentence_transformers.json")
    }
    home = config.parent / "hf"
    with LocalHub() as hub:
        hub.publish(BGE, files)
        Hub(home, endpoint=hub.url).fetch(Origin(repo=BGE, files=(GRAPH,)))
    found = catalog(config, f"mine: {{name: {BGE}, max_tokens: {limit}, prompts: {{}}}}")
    locate = Locator(Settings(allowed_embedding_models=(), hf_home=home, hf_hub_offline=True))
    if limit > POSITIONS:
        with pytest.raises(ModelFilesError, match=f"mine has positions for {POSITIONS} tokens"):
            locate(found.models["mine"])
        return
    spec = locate(found.models["mine"])
    assert (spec.id, spec.max_tokens, spec.prompts) == ("mine", limit, {})
    plain = locate(found.find(BGE))
    assert plain.max_tokens == MAX_TOKENS
    assert plain.prompts


def test_repositories_of_the_hub(config: Path) -> None:
    """A name that no list has is looked up; out of reach, it is made what was wanted later."""
    model = export(write_model(config.parent / "m"))
    files = {
        str(path.relative_to(model)): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file()
    }
    files["onnx/model_O4.onnx"] = files[GRAPH]
    line = "mine: {name: some/one, dimensions: 8, max_tokens: 60, file: onnx/model_O4.onnx}"
    nowhere = {"hf_hub_offline": False, "hf_endpoint": "http://127.0.0.1:9"}
    (waiting,) = catalog(config, line, **nowhere).models.values()
    assert waiting.unidentified
    late = "a: {name: some/one, type: late-interaction, prompts: {}}"
    assert catalog(config, late, **nowhere).models["a"].unidentified
    with LocalHub() as hub:
        hub.publish("some/one", files)
        reached = {"hf_hub_offline": False, "hf_endpoint": hub.url}
        (found,) = catalog(config, line, **reached).models.values()
        settings = Settings(
            allowed_embedding_models=(), hf_home=config.parent / "hf", hf_endpoint=hub.url
        )
        for spec in map(Locator(settings), (waiting, found)):
            assert (spec.id, spec.file, spec.max_tokens) == ("mine", "onnx/model_O4.onnx", 60)
            assert (spec.dimensions, spec.width, spec.pooling) == (8, HIDDEN, Pooling.MEAN)
            assert (spec.directory / "onnx/model_O4.onnx").exists()
        line = line.replace("8", "80")
        assert f"gives {HIDDEN} dimensions, not 80" in mistake(config, line, **reached)[1]


def test_nothing_published_is_asked_for_own_models(config: Path) -> None:
    """Where entries name directories alone the published ones are not even listed."""
    write_model(config.parent / "m")
    entries = read_config(write(config, "a: {name: m}"))

    def published() -> list[ModelSpec]:
        raise AssertionError

    allowed = {Task.EMBED: ("a",), Task.RERANK: ()}
    assert list(Catalog([], allowed, published, entries=entries).models) == ["a"]
