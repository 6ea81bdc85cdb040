"""Building blocks of encoders on packed tokens, shared by all families.

Tokens of all texts of a batch lie behind one another without padding: token states have shape
(tokens, hidden), so every matrix product touches real tokens only. Attention alone needs one row
per text; `Packing` moves states between the two layouts, and skips that where all texts are
equally long.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.convert.graph import Graph
from embedding_server.core import Pooling


class ConvertError(Exception):
    """The model cannot be converted; the message names the file and what is wrong."""


Weights = Callable[[str], NDArray[Any]]
"""Looks a tensor up by its name in the checkpoint."""


class Packing:
    """The batch's layout, computed once in the graph from the lengths of its texts.

    Args:
        graph: the graph to write to.
        lengths: int64 value of shape (texts,).
        hidden: width of the token states.
    """

    def __init__(self, graph: Graph, lengths: str, hidden: int) -> None:
        g = self._graph = graph
        self._lengths, self._hidden = lengths, hidden
        longest = g.node("ReduceMax", lengths, keepdims=0)
        steps = g.node("Range", g.constant(0), longest, g.constant(1))
        valid = g.node("Less", g.node("Unsqueeze", steps, g.constant([0])), self._column(lengths))
        self._starts = g.node("CumSum", lengths, g.constant(0), exclusive=1)
        where = g.node("NonZero", valid)
        text = g.node("Gather", where, g.constant(0), axis=0)
        self.positions = g.node("Gather", where, g.constant(1), axis=0)
        self._from_padded = g.node("Add", g.node("Mul", text, longest), self.positions)
        grid = g.node(
            "Add", self._column(self._starts), g.node("Unsqueeze", steps, g.constant([0]))
        )
        self._to_padded = g.node("Where", valid, grid, g.constant(0))
        self._mask = g.node("Cast", valid, to=6)
        self._float_mask = self._column(g.node("Cast", valid, to=1), axis=2)
        self._uniform = g.node("Equal", g.node("ReduceMin", lengths, keepdims=0), longest)
        shape = [
            g.constant([-1]),
            g.node("Unsqueeze", longest, g.constant([0])),
            g.constant([hidden]),
        ]
        self._padded_shape = g.node("Concat", *shape, axis=0)

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        """Bidirectional multi-head attention of (tokens, hidden) states, within each text."""
        g, states = self._graph, (query, key, value)
        flat = g.constant([-1, self._hidden])

        def without_padding() -> str:
            q, k, v = (g.node("Reshape", x, self._padded_shape) for x in states)
            out = g.contrib("MultiHeadAttention", q, k, v, num_heads=heads)
            return g.node("Reshape", out, flat)

        def with_padding() -> str:
            q, k, v = (g.node("Gather", x, self._to_padded) for x in states)
            out = g.contrib("MultiHeadAttention", q, k, v, "", self._mask, num_heads=heads)
            return g.node("Gather", g.node("Reshape", out, flat), self._from_padded)

        return g.choose(self._uniform, without_padding, with_padding)

    def pool(self, states: str, pooling: Pooling) -> str:
        """One vector of shape (hidden,) per text from (tokens, hidden) states."""
        return _POOLINGS[pooling](self, states)

    def mean(self, states: str) -> str:
        """The mean of each text's states."""
        g = self._graph
        padded = g.node("Mul", g.node("Gather", states, self._to_padded), self._float_mask)
        total = g.node("ReduceSum", padded, g.constant([1]), keepdims=0)
        return g.node("Div", total, self._column(g.node("Cast", self._lengths, to=1)))

    def first(self, states: str) -> str:
        """The state of each text's first token."""
        return self._graph.node("Gather", states, self._starts)

    def last(self, states: str) -> str:
        """The state of each text's last token."""
        g = self._graph
        ends = g.node("Add", self._starts, self._lengths)
        return g.node("Gather", states, g.node("Sub", ends, g.constant(1)))

    def _column(self, value: str, axis: int = 1) -> str:
        return self._graph.node("Unsqueeze", value, self._graph.constant([axis]))


_POOLINGS: dict[Pooling, Callable[[Packing, str], str]] = {
    Pooling.MEAN: Packing.mean,
    Pooling.CLS: Packing.first,
    Pooling.LAST: Packing.last,
}


def linear(g: Graph, weights: Weights, name: str, states: str) -> str:
    """`states @ W.T + b`; torch stores W as (out, in)."""
    weight = g.weight(f"{name}.weight", weights(f"{name}.weight").T)
    bias = g.weight(f"{name}.bias", weights(f"{name}.bias"))
    return g.node("Add", g.node("MatMul", states, weight), bias)


def layer_norm(g: Graph, weights: Weights, name: str, states: str, epsilon: float) -> str:
    """Layer normalisation over the last axis."""
    scale = g.weight(f"{name}.weight", weights(f"{name}.weight"))
    bias = g.weight(f"{name}.bias", weights(f"{name}.bias"))
    return g.node("LayerNormalization", states, scale, bias, axis=-1, epsilon=epsilon)


def gelu(g: Graph, states: str) -> str:
    """The exact GELU, x/2 * (1 + erf(x / sqrt 2)), in the form ONNX Runtime fuses."""
    erf = g.node("Erf", g.node("Div", states, g.constant(math.sqrt(2.0))))
    return g.node(
        "Mul", g.node("Mul", states, g.node("Add", erf, g.constant(1.0))), g.constant(0.5)
    )


def gelu_tanh(g: Graph, states: str) -> str:
    """The tanh approximation of GELU, `gelu_new` in transformers."""
    return g.contrib("FastGelu", states)


_ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda g, states: g.node("Relu", states),
}


def activation(name: str) -> Callable[[Graph, str], str]:
    """The activation that config.json calls `name`; raises `ConvertError`."""
    if name not in _ACTIVATIONS:
        raise ConvertError(f"hidden_act {name} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def embedding(g: Graph, name: str, table: NDArray[np.float32], index: str) -> str:
    """Rows of `table` by int64 `index`."""
    return g.node("Gather", g.weight(name, table), index)
