"""Other ways to run the same weights, in process; what is not installed is reported as absent."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.load import bodies, drive
from benchmarks.loads import Beside
from benchmarks.server import started
from embedding_server.convert.blocks import gelu, layer_norm
from embedding_server.convert.checkpoint import Checkpoint
from embedding_server.convert.graph import Graph
from embedding_server.core import ModelSpec

_TEXTS, _WARM_UP_TEXTS = 300, 32
"""Slow peers get so many texts."""


def peers(
    spec: ModelSpec, texts: Sequence[str], lengths: Sequence[int], cores: int, beside: Beside
) -> dict[str, tuple[float, float] | None]:
    """Tokens per second of every peer and their share of the limit, None where it is absent.

    `lengths` are the tokens of every text.
    """
    sample = list(texts[:_TEXTS])
    tokens, mean = sum(lengths[:_TEXTS]), sum(lengths) / len(lengths)

    def timed(embed: Callable[[list[str]], object]) -> tuple[float, float]:
        embed(sample[:_WARM_UP_TEXTS])
        return beside(lambda: tokens / _time(lambda: embed(sample)))

    found: dict[str, tuple[float, float] | None] = {}
    with fastembed_model(spec, cores) as embed:
        for name, size in (("default", 256), ("32", 32), ("1", 1)):
            found[f"FastEmbed, batch {name}"] = timed(partial(embed, size))
    model = _sentence_transformers(spec)
    found["sentence-transformers"] = timed(model) if model else None
    for name, load in (("1 x 32 connections", (1, 32)), ("32 x 4 connections", (32, 4))):
        found[f"Infinity, {name}"] = (
            beside(lambda load=load: mean * _infinity(spec, texts, *load))  # type: ignore[misc]
            if shutil.which("infinity_emb")
            else None
        )
    return found


def _infinity(spec: ModelSpec, texts: Sequence[str], per_request: int, connections: int) -> float:
    """Texts per second of Infinity's server with its torch engine."""
    command = ["env", "INFINITY_BETTERTRANSFORMER=false", "infinity_emb", "v2", "--device", "cpu"]
    command += ["--model-id", str(spec.directory), "--engine", "torch"]
    command += ["--served-model-name", "peer"]
    with started(command, "/health", err=subprocess.DEVNULL) as server:
        requests = bodies("peer", texts, per_request)
        drive(f"{server.url}/embeddings", requests, connections, 3.0)
        driven = drive(f"{server.url}/embeddings", requests, connections, 10.0)
    return driven.requests * per_request / driven.seconds


@contextmanager
def fastembed_model(spec: ModelSpec, cores: int) -> Iterator[Callable[[int, list[str]], object]]:
    """FastEmbed's own `embed` on a padded graph of the same weights."""
    from fastembed import TextEmbedding  # noqa: PLC0415 - loading it takes a second
    from fastembed.common.model_description import ModelSource, PoolingType  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("config.json", "special_tokens_map.json"):
            shutil.copy(spec.directory / name, scratch)
        for name, changes in (
            ("tokenizer.json", {"truncation": None, "padding": None}),
            ("tokenizer_config.json", {"model_max_length": spec.max_tokens}),
        ):
            content = json.loads((spec.directory / name).read_text())
            Path(scratch, name).write_text(json.dumps(content | changes))
        padded_graph(spec.directory, Path(scratch, "model.onnx"))
        TextEmbedding.add_custom_model(
            model="bench/padded",
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=ModelSource(url="unused"),
            dim=spec.dimensions,
            model_file="model.onnx",
        )
        model = TextEmbedding("bench/padded", specific_model_path=scratch, threads=cores)

        def embed(size: int, texts: list[str]) -> object:
            return list(model.embed(texts, batch_size=size))

        yield embed


def _linear(graph: Graph, weights: Checkpoint, names: list[str], states: str) -> list[str]:
    """Linear layers of (texts, length, width) states."""
    return [
        graph.node(
            "Add",
            graph.node("MatMul", states, graph.weight(name, weights(f"{name}.weight").T)),
            graph.weight(f"{name}.bias", weights(f"{name}.bias")),
        )
        for name in names
    ]


def padded_graph(directory: Path, path: Path) -> None:
    """The graph that exporters write: plain operators, padding, an attention mask."""
    config = json.loads((directory / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    graph = Graph("padded")
    with Checkpoint(directory) as weights:
        ids, mask = (
            graph.input(name, "texts", "length") for name in ("input_ids", "attention_mask")
        )
        types = graph.input("token_type_ids", "texts", "length")
        length = graph.node(
            "Slice", graph.node("Shape", ids), graph.constant([1]), graph.constant([2])
        )

        def table(name: str) -> str:
            return graph.weight(name, weights(f"embeddings.{name}_embeddings.weight"))

        positions = graph.node(
            "Slice", table("position"), graph.constant([0]), length, graph.constant([0])
        )
        x = graph.node(
            "Add",
            graph.node("Gather", table("word"), ids),
            graph.node("Gather", table("token_type"), types),
        )
        x = layer_norm(
            graph, weights, "embeddings.LayerNorm", graph.node("Add", x, positions), 1e-12
        )
        seen = graph.node("Unsqueeze", graph.node("Cast", mask, to=1), graph.constant([1, 2]))
        bias = graph.node("Mul", graph.node("Sub", graph.constant(1.0), seen), graph.constant(-1e9))

        def split(states: str, order: list[int]) -> str:
            shape = graph.constant([0, 0, heads, width // heads])
            return graph.node("Transpose", graph.node("Reshape", states, shape), perm=order)

        for index in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{index}"
            inner = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
            q, k, v = _linear(graph, weights, inner, x)
            scores = graph.node("MatMul", split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1]))
            scores = graph.node("Div", scores, graph.constant(float(np.sqrt(width // heads))))
            shares = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
            mixed = graph.node(
                "Transpose", graph.node("MatMul", shares, split(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3]
            )
            mixed = graph.node("Reshape", mixed, graph.constant([0, 0, width]))
            (dense,) = _linear(graph, weights, [f"{layer}.attention.output.dense"], mixed)
            x = graph.node("Add", dense, x)
            x = layer_norm(graph, weights, f"{layer}.attention.output.LayerNorm", x, 1e-12)
            (wide,) = _linear(graph, weights, [f"{layer}.intermediate.dense"], x)
            (dense,) = _linear(graph, weights, [f"{layer}.output.dense"], gelu(graph, wide))
            x = graph.node("Add", dense, x)
            x = layer_norm(graph, weights, f"{layer}.output.LayerNorm", x, 1e-12)
    graph.output("last_hidden_state", x, "texts", "length", width)
    graph.save(path)


def _sentence_transformers(spec: ModelSpec) -> Callable[[list[str]], object] | None:
    """Its `encode`; None where it is absent."""
    if find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - may be absent

    model = SentenceTransformer(str(spec.directory), device="cpu")
    return lambda texts: model.encode(texts, batch_size=32)


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
