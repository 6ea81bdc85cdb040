"""safetensors -> ONNX: numbers against plain numpy, caching, damage."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from math import erf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedding_server.convert import ConvertError, convert
from embedding_server.convert.families import FAMILIES, Family
from embedding_server.core import ModelSpec, Pooling
from tests.tiny import HEADS, HIDDEN, LAYERS, POSITIONS, weights, write_model

Array = NDArray[np.float64]


def reference(ids: list[int], seed: int) -> Array:
    """Token states of the tiny BERT by the book, in float64: shape (tokens, hidden)."""
    w: dict[str, Any] = {name: value.astype("f8") for name, value in weights(seed).items()}

    def linear(x: Array, name: str) -> Array:
        result: Array = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return result

    def norm(x: Array, name: str) -> Array:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        result: Array = scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
        return result

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for index in range(LAYERS):
        layer, size = f"encoder.layer.{index}", HIDDEN // HEADS
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (
                linear(x, f"{layer}.attention.self.{name}")[:, part]
                for name in ("query", "key", "value")
            )
            scores = np.exp(q @ k.T / sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        attended = linear(np.concatenate(heads, -1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        wide = linear(x, f"{layer}.intermediate.dense")
        wide = wide * (1 + np.vectorize(erf)(wide / sqrt(2))) / 2
        x = norm(x + linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    result: Array = x
    return result


TEXTS = [[2, 3], [2, 9, 11, 3], [2, 30, 31, 32, 33, 34, 3], [2, 8, 3]]
POOLED = {
    Pooling.MEAN: lambda states: states.mean(0),
    Pooling.CLS: lambda states: states[0],
    Pooling.LAST: lambda states: states[-1],
}


def converted(
    directory: Path, pooling: Pooling, cache: Path, *, weights_sha256: str | None = None
) -> Path:
    """The graph of a dense model."""
    spec = ModelSpec(
        id="m",
        located=directory,
        pooling=pooling,
        max_tokens=POSITIONS,
        dimensions=HIDDEN,
        weights_sha256=weights_sha256,
    )
    return convert(spec, cache)


def run(graph: Path, texts: list[list[int]]) -> tuple[Array, Array]:
    """Pooled rows and token states of a graph."""
    session = ort.InferenceSession(graph)
    feeds = {
        "input_ids": np.concatenate([np.array(text, np.int64) for text in texts]),
        "lengths": np.array([len(text) for text in texts], np.int64),
    }
    rows, states = session.run(["sentence_embedding", "token_embeddings"], feeds)
    return rows, states


@pytest.mark.parametrize("pooling", list(POOLED))
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[1:2] * 3], ids=["mixed", "one", "equal"])
def test_matches_the_book(tmp_path: Path, pooling: Pooling, texts: list[list[int]]) -> None:
    """Every pooling, with and without padding in the batch, agrees with plain numpy."""
    rows, states = run(converted(write_model(tmp_path / "m"), pooling, tmp_path), texts)
    expected = [reference(text, seed=0) for text in texts]
    assert np.abs(states - np.concatenate(expected)).max() < 1e-5
    assert np.abs(rows - np.stack([POOLED[pooling](one) for one in expected])).max() < 1e-5


def test_half_precision_checkpoints(tmp_path: Path) -> None:
    """Weights stored as float16 are computed in float32."""
    model = write_model(tmp_path / "m")
    half = {name: value.astype("f2") for name, value in weights(0).items()}
    save_file(half, model / "model.safetensors")
    rows, _ = run(converted(model, Pooling.MEAN, tmp_path), TEXTS)
    expected = np.stack([reference(text, seed=0).mean(0) for text in TEXTS])
    assert np.abs(rows - expected).max() < 1e-2


def test_cache_key_follows_content(tmp_path: Path) -> None:
    """Same files, same graph file; other weights, pooling or config, another."""
    one, same, other = (
        write_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    cache = tmp_path / "cache"
    first = converted(one, Pooling.MEAN, cache)
    stamp = first.stat().st_mtime_ns
    assert converted(same, Pooling.MEAN, cache) == first
    assert first.stat().st_mtime_ns == stamp
    different = {first, converted(other, Pooling.MEAN, cache), converted(one, Pooling.CLS, cache)}
    assert len(different) == 3


def test_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    """The graph is small, the weights are external data of it, and it is a valid model."""
    graph = converted(write_model(tmp_path / "m"), Pooling.MEAN, tmp_path)
    data = graph.with_name("model.onnx_data")
    assert data.stat().st_size > sum(value.nbytes for value in weights(0).values())
    assert graph.stat().st_size < data.stat().st_size
    onnx.checker.check_model(graph)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Processes that convert the same model at the same time do not break each other."""
    model, cache = write_model(tmp_path / "m"), tmp_path / "cache"
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        graphs = list(pool.map(converted, [model] * 8, [Pooling.MEAN] * 8, [cache] * 8))
    assert len(set(graphs)) == 1
    assert [path.name for path in (cache / "graphs").iterdir()] == [graphs[0].parent.name]
    run(graphs[0], TEXTS)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails half-way is not taken for a graph later."""
    model, cache = write_model(tmp_path / "m"), tmp_path / "cache"

    def broken(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(FAMILIES, "BertModel", Family(encoder=broken))
    with pytest.raises(KeyboardInterrupt):
        converted(model, Pooling.MEAN, cache)
    assert list((cache / "graphs").iterdir()) == []


def test_unusable_directories(tmp_path: Path) -> None:
    """What is missing, damaged, unexpected or unknown is named."""
    model = write_model(tmp_path / "m")
    with pytest.raises(ConvertError, match="expected 00: install the model again"):
        converted(model, Pooling.MEAN, tmp_path, weights_sha256="00")
    config = model / "config.json"
    text = config.read_text()
    config.write_text(text.replace("BertModel", "FooModel"))
    with pytest.raises(ConvertError, match="architecture FooModel, not one of .*BertModel"):
        converted(model, Pooling.MEAN, tmp_path)
    fewer = json.loads(text) | {"num_hidden_layers": LAYERS + 1}
    config.write_text(json.dumps(fewer))
    with pytest.raises(ConvertError, match="encoder.layer.2"):
        converted(model, Pooling.MEAN, tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"hidden_act": "swish"}))
    with pytest.raises(ConvertError, match="activation swish is not one of gelu"):
        converted(model, Pooling.MEAN, tmp_path)
    config.write_text("{")
    with pytest.raises(ConvertError, match="config.json"):
        converted(model, Pooling.MEAN, tmp_path)
    config.write_text(text)
    (model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConvertError, match="model.safetensors"):
        converted(model, Pooling.MEAN, tmp_path)
    (model / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match="model.safetensors: No such file"):
        converted(model, Pooling.MEAN, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConvertError, match="the cache .* cannot be used"):
        converted(write_model(tmp_path / "n"), Pooling.MEAN, tmp_path / "file")
