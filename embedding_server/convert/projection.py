"""What follows the pooling, as a graph of its own: sentence-transformers' Dense modules.

It takes vectors, so that it fits behind graphs of `convert` and behind exported ones.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedding_server.convert.blocks import gelu
from embedding_server.convert.build import MODEL_FILE, cached
from embedding_server.convert.checkpoint import Checkpoint
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Graph
from embedding_server.convert.hashes import content_hash
from embedding_server.convert.origin import GraphOrigin
from embedding_server.core import Projection

VERSION = 1
"""Part of the cache key: raise it whenever the same input would give another graph."""

_LEAST_LENGTH = 1e-12
"""What torch.nn.functional.normalize divides by at least."""

ACTIVATIONS: Mapping[str, Callable[[Graph, str], str]] = {
    "torch.nn.modules.linear.Identity": lambda _, x: x,
    "torch.nn.modules.activation.Tanh": lambda g, x: g.node("Tanh", x),
    "torch.nn.modules.activation.ReLU": lambda g, x: g.node("Relu", x),
    "torch.nn.modules.activation.GELU": gelu,
    "torch.nn.modules.activation.Sigmoid": lambda g, x: g.node("Sigmoid", x),
    "torch.nn.modules.activation.SiLU": lambda g, x: g.node("Mul", x, g.node("Sigmoid", x)),
}
"""By the names that sentence-transformers writes."""


def convert_projections(directory: Path, projections: Sequence[Projection], cache: Path) -> Path:
    """The ONNX graph of a model's projections, built on first use.

    It takes `vectors` (texts, inputs of the first) and gives `sentence_embedding` (texts, outputs
    of the last), not normalised, both float32.

    Args:
        directory: the model's; every projection has its `weights` in it.
        projections: at least one.
        cache: the graph is kept in `<cache>/graphs/<content hash>/`.

    Raises:
        ConvertError: weights are missing, damaged or of another shape.
    """
    digests = [content_hash(directory / one.weights, cache) for one in projections]
    recipe = f"projections {VERSION} {digests} {list(projections)}"
    return cached(cache, recipe, partial(_build, directory, projections))


def require_weights(directory: Path, projections: Sequence[Projection]) -> None:
    """Raise `ConvertError` where a projection's weights are missing, damaged or ill-shaped."""
    for one in projections:
        if not (directory / one.weights).is_file():
            raise ConvertError(f"{directory} has no {one.weights}; pickled weights are not read")
        _weights(directory, one)


def _build(directory: Path, projections: Sequence[Projection], out: Path) -> None:
    graph = Graph("projections")
    vectors = graph.input("vectors", "texts", projections[0].inputs, dtype=TensorProto.FLOAT)
    for one in projections:
        weight, bias = _weights(directory, one)
        if one.normalized:
            vectors = _of_length_1(graph, vectors)
        vectors = graph.node("MatMul", vectors, graph.weight(f"{one.path}.weight", weight.T))
        vectors = graph.node("Add", vectors, graph.weight(f"{one.path}.bias", bias))
        vectors = ACTIVATIONS[one.activation](graph, vectors)
    graph.output("sentence_embedding", vectors, "texts", projections[-1].outputs)
    graph.save(out / MODEL_FILE)
    GraphOrigin(directory=str(directory.resolve()), version=VERSION).write(out)


def _of_length_1(graph: Graph, vectors: str) -> str:
    lengths = graph.node("ReduceL2", vectors, graph.constant([1]), keepdims=1)
    return graph.node("Div", vectors, graph.node("Max", lengths, graph.constant(_LEAST_LENGTH)))


def _weights(directory: Path, one: Projection) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight of shape (outputs, inputs), and bias, of zeros where there is none."""
    wanted = {"linear.weight": (one.outputs, one.inputs), "linear.bias": (one.outputs,)}
    found = {"linear.bias": np.zeros(one.outputs, np.float32)}
    try:
        with Checkpoint(directory / one.path) as weights:
            found |= {name: weights(name) for name in list(wanted)[: 1 + one.bias]}
    except ConvertError as exc:
        raise ConvertError(f"{directory / one.path}: {exc}") from exc
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ConvertError(
                f"{directory / one.weights}: {name} has shape {found[name].shape}, its config.json"
                f" says {shape}"
            )
    return found["linear.weight"], found["linear.bias"]
