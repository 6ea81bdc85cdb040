"""`INFERENCE_MODEL_CONFIG`: what the file says, and every mistake with its line."""

from pathlib import Path

import pytest

from embedding_server.catalog import open_catalog
from embedding_server.catalog.config import Type, read_config
from embedding_server.core import Overrides, Pooling, Precision
from embedding_server.errors import SettingsError
from embedding_server.settings import Settings, load
from tests.catalog.entries import BGE, E5, PASSAGE, mistake, write


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
            ("a: {name: m, precision: fp8}",),
            2,
            "one of fp32, tf32, fp16, bf16, int8, got 'fp8'",
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


def test_settings(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stands in for the allow-list; `~` is the home."""
    settings = load({"INFERENCE_MODEL_CONFIG": str(config)}, {})
    assert settings.allowed_embedding_models == ()
    monkeypatch.setenv("HOME", str(config.parent))
    write(config, "a: {name: m}")
    assert [entry.key for entry in read_config(Path("~/models.yaml"))] == ["a"]
