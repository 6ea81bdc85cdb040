"""Building blocks of encoders on packed tokens, shared by all families.

Tokens of all texts of a batch lie behind one another without padding: token states have shape
(tokens, hidden), so every matrix product touches real tokens only. Attention alone looks at one
text at a time: as one row per text where all are equally long, else text by text, which costs
25 us each where padding cost up to ten times the attention itself.
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
        ids: int64 value of shape (tokens,).
        lengths: int64 value of shape (texts,).
        hidden: width of the token states.
    """

    def __init__(self, graph: Graph, ids: str, lengths: str, hidden: int) -> None:
        g = self._graph = graph
        self.ids = ids
        self._lengths, self._hidden = lengths, hidden
        self._texts = g.node("Size", lengths)
        longest = g.node("ReduceMax", lengths, keepdims=0)
        steps = g.node("Range", g.constant(0), longest, g.constant(1))
        taken = g.node(
            "Less",
            g.node("Unsqueeze", steps, g.constant([0])),
            g.node("Unsqueeze", lengths, g.constant([1])),
        )
        self.positions = g.node("Gather", g.node("NonZero", taken), g.constant(1), axis=0)
        self._starts = g.node("CumSum", lengths, g.constant(0), exclusive=1)
        self._uniform = g.node("Equal", g.node("ReduceMin", lengths, keepdims=0), longest)
        shape = [
            g.constant([-1]),
            g.node("Unsqueeze", longest, g.constant([0])),
            g.constant([hidden]),
        ]
        self._one_row_per_text = g.node("Concat", *shape, axis=0)

    def attention(self, query: str, key: str, value: str, heads: int) -> str:
        """Bidirectional multi-head attention of (tokens, hidden) states, within each text."""
        g, states = self._graph, (query, key, value)

        def attend(q: str, k: str, v: str) -> str:
            return g.contrib("MultiHeadAttention", q, k, v, num_heads=heads)

        def together() -> str:
            return attend(*(g.node("Reshape", one, self._one_row_per_text) for one in states))

        def one_by_one() -> str:
            rows = [g.node("Unsqueeze", one, g.constant([0])) for one in states]
            texts = [self._split(one, axis=1) for one in rows]
            return g.for_each(
                self._texts,
                lambda index: attend(*(g.node("SequenceAt", one, index) for one in texts)),
                axis=1,
            )

        attended = g.choose(self._uniform, together, one_by_one)
        return g.node("Reshape", attended, g.constant([-1, self._hidden]))

    def pool(self, states: str, pooling: Pooling) -> str:
        """One vector of shape (hidden,) per text from (tokens, hidden) states."""
        return _POOLINGS[pooling](self, states)

    def mean(self, states: str) -> str:
        """The mean of each text's states."""
        g, texts = self._graph, self._split(states, axis=0)
        return g.for_each(
            self._texts,
            lambda index: g.node(
                "ReduceMean", g.node("SequenceAt", texts, index), g.constant([0]), keepdims=1
            ),
            axis=0,
        )

    def first(self, states: str) -> str:
        """The state of each text's first token."""
        return self._graph.node("Gather", states, self._starts)

    def last(self, states: str) -> str:
        """The state of each text's last token."""
        g = self._graph
        ends = g.node("Add", self._starts, self._lengths)
        return g.node("Gather", states, g.node("Sub", ends, g.constant(1)))

    def _split(self, states: str, axis: int) -> str:
        """The states of each text, as a sequence of tensors."""
        return self._graph.node("SplitToSequence", states, self._lengths, axis=axis)


_POOLINGS: dict[Pooling, Callable[[Packing, str], str]] = {
    Pooling.MEAN: Packing.mean,
    Pooling.CLS: Packing.first,
    Pooling.LAST: Packing.last,
}


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
