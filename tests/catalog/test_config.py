"""`INFERENCE_MODEL_CONFIG`: every mistake with its line, names, and models of their own."""

from pathlib import Path
from typing import Any

import pytest

from embedding_server.catalog import Catalog, Locator, ModelFilesError, open_catalog
from embedding_server.catalog.config import Type, read_config
from embedding_server.catalog.files import Hub
from embedding_server.core import Kind, ModelSpec, Origin, Overrides, Pooling, Precision, Task
from embedding_server.errors import SettingsError, UnsupportedModel
from embedding_server.settings import DEMO_MODELS, Settings, load
from tests.hub import LocalHub
from tests.tiny import HIDDEN, MAX_TOKENS, POSITIONS, export, write_cross_encoder, write_model

E5, PASSAGE = "intfloat/multilingual-e5-small", {"query": "query: ", "document": "passage: "}
BGE, GRAPH = "Xenova/bge-small-en-v1.5", "onnx/model.onnx"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The file, which nobody has written yet."""
    return tmp_path / "models.yaml"


def write(config: Path, *lines: str) -> Path:
    """The file with these models, from its second line on."""
    config.write_text("\n".join(["models:", *(f"  {line}" for line in lines)]))
    return config


def catalog(config: Path, *lines: str, **changes: Any) -> Catalog:
    """What these models and nothing else make."""
    settings: dict[str, Any] = {
        "allowed_embedding_models": (),
        "model_config": config,
        "hf_home": config.parent / "hf",
        "hf_hub_offline": True,
    }
    write(config, *lines)
    return open_catalog(Settings(**(settings | changes)))


def mistake(config: Path, *lines: str, **changes: Any) -> tuple[int, str]:
    """The line that an error names, and what it says."""
    with pytest.raises(SettingsError) as error:
        catalog(config, *lines, **changes)
    where, text = str(error.value).split(": ", 1)
    assert "\n" not in text
    assert where.startswith(f"INFERENCE_MODEL_CONFIG={str(config)!r}, line ")
    return int(where.rpartition(" ")[2]), text


def test_every_key_is_read(config: Path) -> None:
    """An entry has what its keys say, and knows their lines."""
    write(
        config,
        "my-dense:",
        "  name: org/model",
        "  type: embeddings",
        "  pooling: lasttoken",
        "  max_tokens: 512",
        '  prompts: {query: "query: ", document: "passage: "}',
        "  dimensions: 256",
        "  precision: int8",
        "  revision: abc123",
        "  file: onnx/model_fp16.onnx",
        "  token_ids: cl100k_base",
        "  long_text: truncate",
        "my-reranker: {name: BAAI/bge-reranker-base, type: rerank}",
    )
    dense, reranker = read_config(config)
    assert (dense.key, dense.name, dense.type) == ("my-dense", "org/model", Type.EMBEDDINGS)
    assert dense.overrides == Overrides(
        pooling=Pooling.LAST,
        max_tokens=512,
        prompts=PASSAGE,
        dimensions=256,
        precision=Precision.INT8,
        revision="abc123",
        file="onnx/model_fp16.onnx",
        token_ids="cl100k_base",
    )
    assert dense.lines["precision"] == 9
    assert (reranker.type, reranker.overrides) == (Type.RERANK, Overrides())


@pytest.mark.parametrize("text", ["", "# nothing\n", "models:\n", "models: {}\n"])
def test_no_models(config: Path, text: str) -> None:
    """An empty file has none; then an allow-list must name some."""
    config.write_text(text)
    assert read_config(config) == ()
    with pytest.raises(SettingsError, match=r"names no model: name the models to serve"):
        open_catalog(Settings(allowed_embedding_models=(), model_config=config))


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        (("a: {name: m, pooing: cls}",), 2, "a: pooing is not known, did you mean pooling?"),
        (("a:", "  name: m", "  zzz: 1"), 4, "a: zzz is not known: one of name, type"),
        (("a: {type: rerank}",), 2, "a: name is missing"),
        (("a:", "  name: m", "  type: sparse"), 4, "type: expected one of embeddings, sparse-e"),
        (("a: {name: m, pooling: max}",), 2, "pooling: expected one of mean, cls, lasttoken, got"),
        (("a: {name: m, pooling: none}",), 2, "pooling: expected one of mean, cls, lasttoken, got"),
        (("a: {name: m, pooling: mean_pooling}",), 2, "pooling: expected one of mean, cls"),
        (("a: {name: m, max_tokens: many}",), 2, "expected a number from 1 to 1048576, got 'many'"),
        (("a: {name: m, max_tokens: 0}",), 2, "expected a number from 1 to 1048576, got '0'"),
        (("a: {name: m, max_tokens: 1048577}",), 2, "expected a number from 1 to 1048576"),
        (("a: {name: m, max_tokens: 1.5}",), 2, "expected a number from 1 to 1048576"),
        (("a: {name: m, max_tokens: yes}",), 2, "expected a number from 1 to 1048576"),
        (("a: {name: m, max_tokens: [1]}",), 2, "a: max_tokens: expected a mapping"),
        (("a: {name: m, dimensions: -1}",), 2, "dimensions: expected a number from 1 to 65536"),
        (("a: {name: m, dimensions: 65537}",), 2, "dimensions: expected a number from 1 to 65536"),
        (("a: {name: m, prompts: text}",), 2, "prompts: expected a mapping of input types"),
        (("a: {name: m, prompts: {query: 1}}",), 2, "a: prompts: expected texts, put them in quot"),
        (("a:", "  name: m", "  prompts:", "    q: x", "    q: y"), 6, "q is on line 5 already"),
        (
            ("a: {name: m, precision: tf32}",),
            2,
            "one of fp32, fp16, bf16, int8, got 'tf32'",
        ),
        (("a: {name: m, revision: 1.10}",), 2, "in quotes if it is a number, got '1.10'"),
        (("a: {name: m, revision: 2024-13-45}",), 2, "revision: expected a branch"),
        (("a: {name: m, revision: ../x}",), 2, "revision: expected a branch"),
        (("a: {name: m, file: ../x.onnx}",), 2, "file: expected an .onnx file, or model.safeten"),
        (("a: {name: m, file: /x.onnx}",), 2, "file: expected an .onnx file"),
        (("a: {name: m, file: a/./x.onnx}",), 2, "file: expected an .onnx file"),
        (("a: {name: m, file: pytorch_model.bin}",), 2, "file: expected an .onnx file"),
        (("a: {name: m, token_ids: gpt}",), 2, "expected one of model, cl100k_base, refuse, got"),
        (
            ("a: {name: m, long_text: split}",),
            2,
            "truncate, nothing else is supported, got 'split'",
        ),
        (("a: {name: 5}",), 2, "name: expected an id, an alias or a directory, got '5'"),
        (("a: {name: }",), 2, "name: expected an id, an alias or a directory, got ''"),
        (("a: {name: !!python/name:os.system x}",), 2, "no YAML: could not determine a construct"),
        (("a:", "b: {name: m}"), 2, "a: expected a mapping with keys name, type"),
        (("- a",), 2, "models: expected a mapping"),
        (("1: {name: m}",), 2, "models: a key must be text, put it in quotes"),
        (('"a b": {name: m}',), 2, "'a b' is no name"),
        (('"*": {name: m}',), 2, "'*' is no name"),
        (("a: {name: m}", "b: {name: m}", "a: {name: n}"), 4, "models: a is on line 2 already"),
        (("a: {name: m,", "  name: n}"), 3, "a: name is on line 2 already"),
        (("a: {<<: 1, name: m}",), 2, "no YAML: expected a mapping or list of mappings"),
        (("a: {name: m", "b: {name: n}"), 3, "no YAML: expected ',' or '}'"),
        (("a: *x",), 2, "no YAML: found undefined alias 'x'"),
        (("a: {name: m}", "\tb: 1"), 3, "no YAML: found character '\\t'"),
        (("a: {name: \x07}",), 2, "special characters are not allowed"),
        (("a: {name: ./nowhere}",), 2, "a: name: there is no directory ./nowhere"),
        (("a: {name: /no/where}",), 2, "a: name: there is no directory /no/where"),
        (("a:", "  name: bge-small"), 3, "a: 'bge-small' is not known; did you mean "),
        (("a:", f"  name: {BGE}x"), 3, "HF_HUB_OFFLINE is set"),
        (("a:", f"  name: {BGE}x"), 3, f"; did you mean {BGE}"),
        (("a:", f"  name: {BGE}", "  type: rerank", "  type: rerank"), 5, "is on line 4 already"),
    ],
)
def test_mistakes_name_their_line(
    config: Path, lines: tuple[str, ...], line: int, said: str
) -> None:
    """The error says where and what, and what would be right."""
    found, text = mistake(config, *lines)
    assert found == line
    assert said in text


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


def test_unreadable_files(config: Path) -> None:
    """A file that is missing or no text is named; at the top nothing but `models` is known."""
    for content, said in (
        (None, "INFERENCE_MODEL_CONFIG='.*models.yaml': No such file"),
        (b"# a\n# \xff\n", "line 2: this is no UTF-8"),
        (b"a: 1\n", "line 1: the file: a is not known: one of models is"),
        (b"modles: {}\n", "did you mean models?"),
        (b"- models\n", "line 1: the file: expected a mapping with keys models"),
        (b"models: {}\n---\nmodels: {}\n", "line 2: no YAML: but found another document"),
    ):
        if content is not None:
            config.write_bytes(content)
        with pytest.raises(SettingsError, match=said):
            read_config(config)


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


def test_anchors_and_merges(config: Path) -> None:
    """Entries may share what they say; what an entry says itself wins."""
    write(
        config,
        f"one: &one {{name: {E5}, max_tokens: 256, prompts: &p {{query: q, document: d}}}}",
        "two: &two {<<: *one, max_tokens: 128, prompts: {<<: *p, query: x}}",
        "three: *one",
        "four: {<<: [*one], dimensions: 8}",
        "five: *two",
        "six: &six {<<: *six, name: m}",
    )
    one, two, three, four, five, six = (entry.overrides for entry in read_config(config))
    assert one == three == Overrides(max_tokens=256, prompts={"query": "q", "document": "d"})
    assert six == Overrides()
    assert two == five == Overrides(max_tokens=128, prompts={"query": "x", "document": "d"})
    assert (four.max_tokens, four.dimensions) == (256, 8)


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


def test_settings(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stands in for the allow-list; `~` is the home."""
    settings = load({"INFERENCE_MODEL_CONFIG": str(config)}, {})
    assert settings.allowed_embedding_models == ()
    monkeypatch.setenv("HOME", str(config.parent))
    write(config, "a: {name: m}")
    assert [entry.key for entry in read_config(Path("~/models.yaml"))] == ["a"]


def test_nothing_published_is_asked_for_own_models(config: Path) -> None:
    """Where entries name directories alone the published ones are not even listed."""
    write_model(config.parent / "m")
    entries = read_config(write(config, "a: {name: m}"))

    def published() -> list[ModelSpec]:
        raise AssertionError

    allowed = {Task.EMBED: ("a",), Task.RERANK: ()}
    assert list(Catalog([], allowed, published, entries=entries).models) == ["a"]
