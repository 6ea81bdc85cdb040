"""Own models of every kind: directories whose files, or a YAML, say what they are."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file

from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import read_directory
from embedding_server.convert import ConvertError, stored_precision
from embedding_server.convert.graph import Graph
from embedding_server.core import Kind, Markers, Pooling
from tests.conftest import Client, Serve
from tests.convert.test_families import Golden
from tests.tiny import HIDDEN, VOCABULARY, write_model
from tests.zoo import write_clip, write_splade, write_states, write_static

GOLDENS = Path(__file__).parents[1] / "goldens" / "families"
PYLATE = {
    "query_prefix": "[CLS]",
    "document_prefix": "[SEP]",
    "query_length": 12,
    "document_length": 9,
    "skiplist_words": [".", "!", "long"],
}


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def modules(*kinds: str) -> list[dict[str, str]]:
    """What sentence-transformers writes, in directories numbered from 0."""
    return [
        {"type": f"some.models.{kind}", "path": f"{index}_{kind}" if index else ""}
        for index, kind in enumerate(kinds)
    ]


def write_qwen(directory: Path, name: str, pooling: str | None) -> None:
    """A tiny Qwen3 with a tokenizer; without a pooling it is one that is asked."""
    Golden(GOLDENS / f"{name}.npz").write(directory)
    donor = write_model(directory.with_name(f"{directory.name}-donor"))
    tokenizer = json.loads((donor / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"yes": 80, "no": 81}
    write(directory / "tokenizer.json", tokenizer)
    shutil.rmtree(donor)
    config = json.loads((directory / "config.json").read_text())
    write(directory / "config.json", config | {"max_position_embeddings": 2048})
    if pooling:
        write(directory / "modules.json", modules("Transformer", "Pooling", "Normalize"))
        write(directory / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True})
        prompts = {"query": "the query of it: ", "document": ""}
        write(directory / "config_sentence_transformers.json", {"prompts": prompts})


def write_all(root: Path) -> None:
    """One of each."""
    write_splade(root / "sparse")
    write(root / "sparse" / "modules.json", modules("MLMTransformer", "SpladePooling"))
    write(root / "sparse" / "1_SpladePooling" / "config.json", {"pooling_strategy": "max"})
    shutil.copytree(root / "sparse", root / "untold")
    (root / "untold" / "modules.json").unlink()
    write_states(root / "late", "model.onnx", width=128)
    write(root / "late" / "modules.json", modules("Transformer", "Dense"))
    write(root / "late" / "1_Dense" / "config.json", {"in_features": 32, "out_features": 128})
    write(root / "late" / "config_sentence_transformers.json", PYLATE)
    write_static(root / "static")
    described = {"architectures": ["StaticModel"], "model_type": "model2vec", "hidden_dim": 256}
    write(root / "static" / "config.json", described)
    write(root / "static" / "modules.json", modules("StaticEmbedding", "Normalize"))
    write_clip(root / "image")
    write(root / "image" / "config.json", {"projection_dim": 512})
    write_qwen(root / "qwen", "qwen3", "lasttoken")
    write_qwen(root / "asked", "qwen3-asked", None)
    shutil.copytree(root / "qwen", root / "shards")
    split(root / "shards")


def split(directory: Path) -> None:
    """A model's weights in two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, kept in parts.items():
        save_file({name: tensors[name] for name in kept}, directory / file)
    places = {name: file for file, kept in parts.items() for name in kept}
    write(directory / "model.safetensors.index.json", {"weight_map": places})
    (directory / "model.safetensors").unlink()


@pytest_asyncio.fixture
async def client(serve: Serve, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a server with all of them, one of them told by a YAML."""
    root = tmp_path / "own"
    root.mkdir()
    write_all(root)
    config = tmp_path / "models.yaml"
    config.write_text("models:\n  told: {name: untold, type: sparse-embeddings}\n")
    names = ("sparse", "late", "static", "image", "qwen", "shards")
    async with serve(
        model_path=root,
        model_config=config,
        allowed_embedding_models=names,
        allowed_rerank_models=("asked", "late"),
    ) as client:
        yield client


async def post(client: Client, path: str, **body: Any) -> Any:
    """The answer of a request that succeeds."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_every_kind_serves(client: Client) -> None:
    """Each on its route; what a YAML tells counts as much as what the files do."""
    texts = ["the of that", "was! it"]
    told = await post(client, "/api/embed/sparse", model="told", input=texts)
    found = await post(client, "/api/embed/sparse", model="sparse", input=texts)
    assert told["embeddings"] == found["embeddings"]
    late = await post(client, "/api/embed", model="late", input=texts, output="tokens")
    assert [len(one) for one in late["embeddings"]] == [6, 5]  # "!" is left out
    query = {"input": texts, "input_type": "query", "output": "tokens"}
    late = await post(client, "/api/embed", model="late", **query)
    assert [len(one) for one in late["embeddings"]] == [12, 12]
    body = {"model": "late", "input": ["the " * 30], "output": "tokens"}
    for kind, length in (("query", 12), ("document", 9)):
        answer = await client.post("/api/embed", json=body | {"input_type": kind})
        assert len(answer.json()["embeddings"][0]) == length
        assert answer.headers["x-truncated-inputs"] == "1"
    static = await post(client, "/api/embed", model="static", input=texts)
    assert np.array(static["embeddings"]).shape == (2, 256)
    ranked = await post(client, "/api/rerank", model="late", query="of", documents=texts)
    assert len(ranked["results"]) == 2


async def test_qwen3(client: Client) -> None:
    """Last-token vectors of length 1, cut and then normalised, instructed for queries only."""
    texts = ["the of that was", "it"]
    whole = np.array((await post(client, "/api/embed", model="qwen", input=texts))["embeddings"])
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-5
    cut = await post(client, "/api/embed", model="qwen", input=texts, dimensions=8)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert np.abs(cut["embeddings"] - expected).max() < 1e-5
    query = await post(client, "/api/embed", model="qwen", input=texts, input_type="query")
    assert np.abs(query["embeddings"] - whole).max() > 0.01
    document = await post(client, "/api/embed", model="qwen", input=texts, input_type="document")
    assert document["embeddings"] == whole.tolist()
    shards = await post(client, "/api/embed", model="shards", input=texts)
    assert shards["embeddings"] == whole.tolist()


async def test_asked_reranker(client: Client) -> None:
    """A document's score depends on query and document, and on nobody else's."""
    documents = ["the of that", "was it", "for you"]
    both = await post(client, "/api/rerank", model="asked", query="of", documents=documents)
    scores = {one["index"]: one["score"] for one in both["results"]}
    assert len(set(scores.values())) == 3
    for index, document in enumerate(documents):
        lone = await post(client, "/api/rerank", model="asked", query="of", documents=[document])
        assert abs(lone["results"][0]["score"] - scores[index]) < 1e-4


def test_what_the_files_say(tmp_path: Path) -> None:
    """Kind, pooling, width and markers, and what is refused."""
    write_all(tmp_path)
    late = read_directory(tmp_path / "late", "late")
    assert (late.kind, late.pooling, late.dimensions) == (Kind.MULTI, Pooling.TOKENS, 128)
    assert late.markers == Markers(
        query="[CLS]",
        document="[SEP]",
        expand=12,
        skip=".!",
        query_tokens=12,
        document_tokens=9,
    )
    assert read_directory(tmp_path / "static", "s").file == "model.safetensors"
    assert read_directory(tmp_path / "image", "i").takes_images
    assert read_directory(tmp_path / "asked", "a").template
    assert read_directory(tmp_path / "untold", "u").kind is Kind.DENSE
    (tmp_path / "late" / "model.onnx").rename(tmp_path / "late" / "model.safetensors")
    with pytest.raises(ModelFilesError, match="late-interaction models need an exported graph"):
        read_directory(tmp_path / "late", "late")
    sums = {"pooling_strategy": "sum"}
    write(tmp_path / "sparse" / "1_SpladePooling" / "config.json", sums)
    with pytest.raises(ModelFilesError, match="pooling_strategy sum is not supported, max is"):
        read_directory(tmp_path / "sparse", "sparse")


async def test_reduced_precision_of_every_kind(serve: Serve, tmp_path: Path) -> None:
    """What is asked and what gives words loads in half precision, warmed up or not."""
    write_qwen(tmp_path / "asked", "qwen3-asked", None)
    Golden(GOLDENS / "bert-words.npz").write(tmp_path / "words")
    shutil.copy(tmp_path / "asked" / "tokenizer.json", tmp_path / "words" / "tokenizer.json")
    write(tmp_path / "words" / "modules.json", modules("MLMTransformer", "SpladePooling"))
    async with serve(
        model_path=tmp_path,
        allowed_embedding_models=("words",),
        allowed_rerank_models=("asked",),
        precision="fp16",
        warmup_ms=20,
    ) as client:
        words = await post(client, "/api/embed/sparse", model="words", text="the of")
        assert words["embeddings"][0]["indices"]
        ranked = await post(client, "/api/rerank", model="asked", query="a", documents=["of"])
        assert len(ranked["results"]) == 1
        models = (await client.get("/health/status")).json()["models"]
        assert {one["precision"] for one in models.values()} == {"fp16"}


async def test_graphs_that_quantise_as_they_run(serve: Serve, tmp_path: Path) -> None:
    """One scale for a whole batch would make vectors depend on neighbours: texts run alone."""
    directory = write_model(tmp_path / "dynamic")
    (directory / "model.safetensors").unlink()
    graph = Graph("dynamic")
    ids, mask = (graph.input(name, "n", "t") for name in ("input_ids", "attention_mask"))
    table = np.random.default_rng(0).normal(size=(len(VOCABULARY), HIDDEN)).astype("f4")
    table[:9] *= 50
    states = graph.node("Gather", graph.weight("words", table), ids)
    numbers, scale, zero = graph.node_outputs("DynamicQuantizeLinear", 3, states)
    rough = graph.node("DequantizeLinear", numbers, scale, zero)
    seen = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([2]))
    graph.output("last_hidden_state", graph.node("Mul", rough, seen), "n", "t", HIDDEN)
    graph.save(directory / "model.onnx")
    async with serve(
        model_path=tmp_path, allowed_embedding_models=("dynamic",), allowed_rerank_models=()
    ) as client:
        texts = ["z y x", "the a of", "w v"]
        together = await post(client, "/api/embed", model="dynamic", input=texts)
        for text, vector in zip(texts, together["embeddings"], strict=True):
            alone = await post(client, "/api/embed", model="dynamic", text=text)
            assert alone["embeddings"] == [vector]


def test_poolings_as_they_are_written(tmp_path: Path) -> None:
    """Newer files name the pooling, modules.json says where, and prompts that do not count do."""
    model = write_model(tmp_path / "m")
    write(model / "modules.json", modules("Transformer", "Normalize", "Pooling"))
    config = model / "2_Pooling" / "config.json"
    known: list[tuple[dict[str, Any], Pooling]] = [
        ({"pooling_mode": "cls"}, Pooling.CLS),
        ({"pooling_mode": ["mean"], "pooling_mode_mean_tokens": True}, Pooling.MEAN),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 32}, Pooling.LAST),
    ]
    for said, pooling in known:
        write(config, said)
        assert read_directory(model, "m").pooling is pooling
    refused: list[tuple[dict[str, Any], str]] = [
        ({"pooling_mode": "max"}, "pooling .*max.* is not supported"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt false"),
        ({"pooling_mode": ["mean", "cls"]}, "is not supported"),
    ]
    for said, words in refused:
        write(config, said)
        with pytest.raises(ModelFilesError, match=words):
            read_directory(model, "m")
    config.unlink()
    with pytest.raises(ModelFilesError, match="2_Pooling/config.json is missing"):
        read_directory(model, "m")


def test_own_models_that_cannot_work(tmp_path: Path) -> None:
    """What would never load is said at start: an architecture, a tokenizer, a link, a pointer."""
    write_qwen(tmp_path / "shards", "qwen3", "lasttoken")
    split(tmp_path / "shards")
    shard = tmp_path / "shards" / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFilesError, match="outside its directory"):
        read_directory(tmp_path / "shards", "s")
    model = write_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    write(model / "config.json", config | {"architectures": ["T5EncoderModel"]})
    with pytest.raises(ModelFilesError, match="architecture T5EncoderModel, not one of Bert"):
        read_directory(model, "m")
    write(model / "config.json", config)
    (model / "tokenizer.json").rename(model / "kept")
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        read_directory(model, "m")
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json"):
        read_directory(model, "m")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (model / "model.safetensors").write_bytes(pointer)
    with pytest.raises(ConvertError, match=r"model\.safetensors: no safetensors file"):
        stored_precision(model)
