"""Building blocks of encoders on packed tokens, shared by all families."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.convert.checkpoint import Checkpoint
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Graph
from embedding_server.convert.linear import Linear, bias_of, stored
from embedding_server.convert.packing import Batch, Rotary

WORDS = "embeddings.word_embeddings.weight"
SEGMENTS = "embeddings.token_type_embeddings.weight"


class Net:
    """A network under construction: what every family writes with.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's tensors.
        linear: how linear layers are computed.
        config: config.json.
        packing: the batch.
        directory: the model's, for what its other files say.
        layers: make the states behind every layer outputs, `layer_<index>`.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Checkpoint,
        linear: Linear,
        config: dict[str, Any],
        *,
        packing: Batch,
        directory: Path,
        layers: bool = False,
    ) -> None:
        self.graph, self.weights, self.config, self.packing = graph, weights, config, packing
        self._linear, self._directory, self._layers = linear, directory, layers

    def project(self, states: str, *names: str) -> list[str]:
        """The outputs of linear layers that share their input."""
        return self._linear(self.graph, self.weights, names, states)

    def fused(self, states: str, *names: str, parts: int) -> list[str]:
        """So many equal outputs, of as many linear layers or of one that is all of them."""
        outputs = self.project(states, *names)
        return outputs if len(outputs) == parts else self.graph.split(outputs[0], parts)

    def add(self, one: str, other: str) -> str:
        """The sum."""
        return self.graph.node("Add", one, other)

    def layer(self, index: int, states: str) -> str:
        """The same states (tokens, width): those behind so many layers, 0: the embeddings.

        They are counted as transformers counts `hidden_states`.
        """
        if self._layers:
            self.graph.output(f"layer_{index}", states, "tokens", "width")
        return states

    def embed(self, name: str, index: str, table: NDArray[np.float32] | None = None) -> str:
        """Rows of a tensor, or of `table` in its place, by int64 `index`."""
        g = self.graph
        rows = stored(g, self.weights, name) if table is None else g.weight(name, table)
        return g.node("Gather", rows, index)

    def tokens(self) -> str:
        """Embeddings of words, and of which text of a pair each is in, if there is such a table.

        Without pairs all tokens belong to segment 0, as they do where the table has but one row.
        """
        x = self.embed(WORDS, self.packing.ids)
        if SEGMENTS not in self.weights:
            return x
        table, segments = self.weights(SEGMENTS), self.packing.segments
        if segments and len(table) > 1:
            return self.add(x, self.embed(SEGMENTS, segments))
        return self.add(x, self.graph.weight(SEGMENTS, table[0]))

    def norm(self, name: str, states: str, epsilon: float) -> str:
        """Layer normalisation over the last axis, with or without a bias."""
        return layer_norm(self.graph, self.weights, name, states, epsilon)

    def rms_norm(self, name: str, states: str, epsilon: float) -> str:
        """Root mean square normalisation over the last axis (Zhang and Sennrich 2019).

        It is written in the form that ONNX Runtime fuses; squares are of float32.
        """
        g = self.graph
        wide = g.single(states)
        squares = g.node("Pow", wide, g.exact(2.0))
        mean = g.node("ReduceMean", squares, g.constant([-1]), keepdims=1)
        root = g.node("Sqrt", g.node("Add", mean, g.exact(epsilon)))
        scale = g.weight(f"{name}.weight", self.weights(f"{name}.weight"))
        return g.node("Mul", g.narrow(g.node("Div", wide, root)), scale)

    def tied(self, states: str, table: str, bias: str) -> str:
        """Logits (tokens, vocabulary) by the embedding table, which the graph already holds."""
        self.expect(tie_word_embeddings=True)
        g = self.graph
        return g.node("Gemm", states, table, g.weight(bias, self.weights(bias)), transB=1)

    def activate(self, name: str, states: str) -> str:
        """The activation that config.json calls `name`; raises `ConvertError`."""
        if name not in _ACTIVATIONS:
            raise ConvertError(f"activation {name} is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name](self.graph, states)

    def rotary(
        self, name: str, theta: float, width: int, positions: int, stretch: float = 1.0
    ) -> Rotary:
        """Tables for so many positions, `stretch` of which turn as one, of heads that wide."""
        steps = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width) / stretch
        angles = np.arange(positions, dtype=np.float64)[:, None] * steps
        tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
        cos, sin = (
            self.graph.weight(f"{name}.{part}", table.astype(np.float32))
            for part, table in tables.items()
        )
        return Rotary(cos, sin)

    def token(self, token: str) -> int:
        """The id of a token in tokenizer.json; raises `ConvertError`."""
        path = self._directory / "tokenizer.json"
        try:
            described = json.loads(path.read_bytes())
            added = {one["content"]: one["id"] for one in described.get("added_tokens", ())}
            return int((dict(described["model"]["vocab"]) | added)[token])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConvertError(f"{path} has no token {token!r}: {exc}") from exc

    def expect(self, **values: Any) -> None:
        """Raise `ConvertError` where config.json asks for what is not built here."""
        for key, value in values.items():
            found = self.config.get(key, value)
            if found not in (value, None):
                raise ConvertError(f"{key}={found!r} in config.json is not supported, {value!r} is")


Encoder = Callable[[Net], str]
"""Writes a family's encoder; gives token states (tokens, width)."""
Head = Callable[[Net, str], str]
"""What a task makes of token states: scores (texts, labels), or logits (tokens, vocabulary)."""


def layer_norm(g: Graph, weights: Checkpoint, name: str, states: str, epsilon: float) -> str:
    """Layer normalisation over the last axis, with or without a bias."""
    scale = g.weight(f"{name}.weight", weights(f"{name}.weight"))
    bias = bias_of(g, weights, name)
    shift = [bias] if bias else []
    return g.node("LayerNormalization", states, scale, *shift, axis=-1, epsilon=epsilon)


def gelu(g: Graph, states: str) -> str:
    """The exact GELU, x/2 * (1 + erf(x / sqrt 2)), in the form ONNX Runtime fuses."""
    if g.target == "cuda":
        return g.contrib("Gelu", states)
    erf = g.node("Erf", g.node("Div", states, g.constant(math.sqrt(2.0))))
    return g.node(
        "Mul", g.node("Mul", states, g.node("Add", erf, g.constant(1.0))), g.constant(0.5)
    )


def _gelu_tanh(g: Graph, states: str) -> str:
    """The tanh approximation of GELU, `gelu_new` in transformers."""
    return g.contrib("FastGelu", states)


def _silu(g: Graph, states: str) -> str:
    return g.contrib("QuickGelu", states, alpha=1.0)


_ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda g, states: g.node("Relu", states),
    "silu": _silu,
    "tanh": lambda g, states: g.node("Tanh", states),
}
