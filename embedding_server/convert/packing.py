"""The layout of a batch in graphs of `convert`: tokens of all texts behind one another, no padding.

Token states have shape (tokens, hidden), so every matrix product touches real tokens only.
Attention alone looks at one text at a time: as one row per text where all are equally long, else
text by text, which costs 25 us each where padding cost up to ten times the attention itself.

Memory of attention grows linearly with a text's length: without a bias by ONNX Runtime's kernel,
with one, or causal, because long texts attend a block of tokens at a time.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import onnx

from embedding_server.convert.graph import Graph
from embedding_server.core import Pooling

Bias = Callable[[Graph, str, str], str]
"""(graph, positions (q,) of queries, positions (k,) of keys) -> what is added to their scores,
shape (1, heads or 1, q, k). The same object every time is the same bias."""

Attend = Callable[[str, str, str], str]
"""Query, key and value states (texts, length, width) -> what they attend to."""
Biased = Callable[[str, str, str, str], str]
"""The same with a bias."""

_INT32 = onnx.TensorProto.INT32
_BLOCK = 512
"""Queries that attend at once, with a bias."""
_CAUSAL_AT_ONCE, _CAUSAL_BLOCK = 2048, 128
"""A causal text up to the first length attends at once, a longer one in blocks; both hold 4 MB of
scores a head (at 32,768 tokens 16 MB)."""


class Heads(msgspec.Struct, frozen=True):
    """How many heads query states have, and key and value states, and how wide each is."""

    query: int
    kv: int
    width: int


class Rotary(msgspec.Struct, frozen=True):
    """Rotary positions (Su et al. 2021, RoFormer), halves of a head turned against one another.

    `cos` and `sin` are values of shape (positions, width / 2), of heads so wide.
    """

    cos: str
    sin: str


def distances(g: Graph, queries: str, keys: str) -> str:
    """How far positions (q,) and (k,) are apart: int64, (q, k)."""
    rows = g.node("Unsqueeze", queries, g.constant([1]))
    return g.node("Abs", g.node("Sub", rows, g.node("Unsqueeze", keys, g.constant([0]))))


class Batch(Protocol):
    """What a family's graph sees of a batch; `convert` chooses one by the graph's target.

    States have shape (tokens, width); `ids`, `segments` and positions are int64, (tokens,).
    """

    ids: str
    segments: str | None

    @property
    def positions(self) -> str:
        """Of every token in its text."""

    def attention(
        self, query: str, key: str, value: str, heads: int, bias: Bias | None = None
    ) -> str:
        """Bidirectional multi-head attention, within each text."""

    def causal(self, query: str, key: str, value: str, heads: Heads) -> str:
        """Attention of every token to those before it and itself, within each text."""

    def rotated(self, states: str, heads: int, rotary: Rotary) -> str:
        """States turned by their positions."""

    def pool(self, states: str, pooling: Pooling) -> str:
        """One vector per text."""

    def mean(self, states: str) -> str:
        """The mean of each text's states."""

    def largest(self, states: str) -> str:
        """The largest of each text's states, for every dimension by itself."""

    def first(self, states: str) -> str:
        """The state of each text's first token."""

    def last(self, states: str) -> str:
        """The state of each text's last token."""


class Packing:
    """A batch in a graph for the CPU, computed once from the lengths of its texts.

    Args:
        graph: the graph to write to.
        ids: int64 value of shape (tokens,).
        lengths: int64 value of shape (texts,).
        segments: int64 value of shape (tokens,), which text of a pair; None: there are no pairs.
    """

    def __init__(self, graph: Graph, ids: str, lengths: str, segments: str | None = None) -> None:
        g = self._graph = graph
        self.ids, self.segments = ids, segments
        self._lengths = lengths
        self._texts = g.node("Size", lengths)
        self._longest = g.node("ReduceMax", lengths, keepdims=0)
        steps = self._range(self._longest)
        taken = g.node(
            "Less",
            g.node("Unsqueeze", steps, g.constant([0])),
            g.node("Unsqueeze", lengths, g.constant([1])),
        )
        self.positions = g.node("Gather", g.node("NonZero", taken), g.constant(1), axis=0)
        self._starts = g.node("CumSum", lengths, g.constant(0), exclusive=1)
        self._uniform = g.node("Equal", g.node("ReduceMin", lengths, keepdims=0), self._longest)
        batch = [g.node("Unsqueeze", one, g.constant([0])) for one in (self._texts, self._longest)]
        self._one_row_per_text = g.node("Concat", *batch, g.constant([-1]), axis=0)
        self._shared: dict[Bias, str] = {}

    def attention(
        self, query: str, key: str, value: str, heads: int, bias: Bias | None = None
    ) -> str:
        """Bidirectional multi-head attention of (tokens, width) states, within each text."""
        g, states = self._graph, (query, key, value)

        def attend(q: str, k: str, v: str, *added: str) -> str:
            rest = ("", "", *added) if added else ()
            return g.contrib("MultiHeadAttention", q, k, v, *rest, num_heads=heads)

        if not bias:
            return self._each_text(self._uniform, attend, attend, states)
        shared = self._shared_bias(bias)
        return self._each_text(
            self._short(_BLOCK),
            lambda q, k, v: attend(q, k, v, shared),
            lambda q, k, v: self._in_blocks((q, k, v), bias, attend),
            states,
        )

    def causal(self, query: str, key: str, value: str, heads: Heads) -> str:
        """Attention of every token to those before it and itself, within each text.

        Groups of query heads share a key and value head (Ainslie et al. 2023, GQA).
        """
        attend = _Causal(self._graph, heads)
        states = (query, key, value)
        return self._each_text(self._short(_CAUSAL_AT_ONCE), attend.at_once, attend.text, states)

    def rotated(self, states: str, heads: int, rotary: Rotary) -> str:
        """(tokens, width) states turned by their positions."""
        g = self._graph
        # A row per token: one row of all of them may be longer than the tables.
        row, positions = (
            g.node("Unsqueeze", one, g.constant([1])) for one in (states, self.positions)
        )
        turned = g.contrib(
            "RotaryEmbedding",
            row,
            positions,
            rotary.cos,
            rotary.sin,
            num_heads=heads,
        )
        return g.node("Squeeze", turned, g.constant([1]))

    def pool(self, states: str, pooling: Pooling) -> str:
        """One vector per text from (tokens, width) states."""
        return _POOLINGS[pooling](self, states)

    def mean(self, states: str) -> str:
        """The mean of each text's states."""
        return self._reduced("ReduceMean", states)

    def largest(self, states: str) -> str:
        """The largest of each text's states, for every dimension by itself."""
        return self._reduced("ReduceMax", states)

    def first(self, states: str) -> str:
        """The state of each text's first token."""
        return self._graph.node("Gather", states, self._starts)

    def last(self, states: str) -> str:
        """The state of each text's last token."""
        g = self._graph
        ends = g.node("Add", self._starts, self._lengths)
        return g.node("Gather", states, g.node("Sub", ends, g.constant(1)))

    def _reduced(self, op: str, states: str) -> str:
        g, texts = self._graph, self._split(states, axis=0)
        return g.for_each(
            self._texts,
            lambda index: g.node(
                op, g.node("SequenceAt", texts, index), g.constant([0]), keepdims=1
            ),
            axis=0,
        )

    def _each_text(
        self,
        together: str,
        all_at_once: Attend,
        one_text: Attend,
        states: tuple[str, str, str],
    ) -> str:
        """Attention as one row per text where `together` holds, else of one text after another."""
        g = self._graph

        def rows() -> str:
            return all_at_once(*(g.node("Reshape", one, self._one_row_per_text) for one in states))

        def one_by_one() -> str:
            lone = [g.node("Unsqueeze", one, g.constant([0])) for one in states]
            texts = [self._split(one, axis=1) for one in lone]
            return g.for_each(
                self._texts,
                lambda index: one_text(*(g.node("SequenceAt", text, index) for text in texts)),
                axis=1,
            )

        return g.node("Flatten", g.choose(together, rows, one_by_one), axis=2)

    def _in_blocks(self, states: tuple[str, str, str], bias: Bias, attend: Biased) -> str:
        """Attention of one text, (1, length, width) states, a block of queries at a time."""
        g, (query, key, value) = self._graph, states
        length = g.node("Squeeze", g.node("Shape", query, start=1, end=2), g.constant([0]))
        positions = self._range(length)

        def block(index: str) -> str:
            bounds = _bounds(g, index, _BLOCK)
            some = g.node("Slice", query, *bounds, g.constant([1]))
            added = bias(g, g.node("Slice", positions, *bounds, g.constant([0])), positions)
            return attend(some, key, value, added)

        return g.for_each(_blocks(g, length, _BLOCK), block, axis=1)

    def _shared_bias(self, bias: Bias) -> str:
        """The bias among texts that are all as long as the longest, if those are short."""
        if bias not in self._shared:
            # Of long texts it would be too large, and is not used.
            length = self._graph.node("Min", self._longest, self._graph.constant(_BLOCK))
            positions = self._range(length)
            self._shared[bias] = bias(self._graph, positions, positions)
        return self._shared[bias]

    def _short(self, tokens: int) -> str:
        """Whether all texts are equally long, and not longer than that."""
        g = self._graph
        bounded = g.node("LessOrEqual", self._longest, g.constant(tokens))
        return g.node("And", self._uniform, bounded)

    def _range(self, length: str) -> str:
        return self._graph.node("Range", self._graph.constant(0), length, self._graph.constant(1))

    def _split(self, states: str, axis: int) -> str:
        """The states of each text, as a sequence of tensors."""
        return self._graph.node("SplitToSequence", states, self._lengths, axis=axis)


class _Causal:
    """Causal attention of (texts, length, width) states."""

    def __init__(self, graph: Graph, heads: Heads) -> None:
        self._graph, self._heads = graph, heads

    def at_once(self, query: str, key: str, value: str) -> str:
        """Of texts that are equally long."""
        g = self._graph
        texts, length = (g.node("Shape", query, start=axis, end=axis + 1) for axis in (0, 1))
        last = g.node("Sub", length, g.constant([1]))
        lasts = g.node("Expand", last, texts)
        return self._attend((query, key, value), ("", ""), lasts, length)[0]

    def text(self, query: str, key: str, value: str) -> str:
        """Of one text, in blocks if it is long."""
        g = self._graph
        length = g.node("Squeeze", g.node("Shape", query, start=1, end=2), g.constant([0]))
        short = g.node("LessOrEqual", length, g.constant(_CAUSAL_AT_ONCE))
        states = (query, key, value)
        return g.choose(
            short, lambda: self.at_once(*states), lambda: self._in_blocks(states, length)
        )

    def _in_blocks(self, states: tuple[str, str, str], length: str) -> str:
        """Each block attends to the keys and values of those before it, and to its own."""
        g = self._graph

        def block(index: str, past_key: str, past_value: str) -> tuple[str, ...]:
            bounds = _bounds(g, index, _CAUSAL_BLOCK)
            some = [g.node("Slice", one, *bounds, g.constant([1])) for one in states]
            before = g.node("Shape", past_key, start=2, end=3)
            total = g.node("Add", before, g.node("Shape", some[0], start=1, end=2))
            last = g.node("Sub", total, g.constant([1]))
            return self._attend((some[0], some[1], some[2]), (past_key, past_value), last, total)

        nothing = g.constant(np.zeros((1, self._heads.kv, 0, self._heads.width), np.float32))
        blocks = _blocks(g, length, _CAUSAL_BLOCK)
        return g.for_each(blocks, block, axis=1, carried=(nothing, nothing))

    def _attend(
        self, states: tuple[str, str, str], past: tuple[str, str], last: str, total: str
    ) -> tuple[str, ...]:
        """The attended states, and all keys and values so far.

        `last` is the position of each text's last token, shape (texts,), `total` shape (1,).
        """
        g = self._graph
        scalar = g.node("Squeeze", total, g.constant([0]))
        return g.contrib_outputs(
            "GroupQueryAttention",
            3,
            *states,
            *past,
            g.node("Cast", last, to=_INT32),
            g.node("Cast", scalar, to=_INT32),
            num_heads=self._heads.query,
            kv_num_heads=self._heads.kv,
        )


def _blocks(g: Graph, length: str, size: int) -> str:
    """How many blocks a text is, the last one may be shorter."""
    return g.node("Div", g.node("Add", length, g.constant(size - 1)), g.constant(size))


def _bounds(g: Graph, index: str, size: int) -> tuple[str, str]:
    """Where a block starts and ends, as `Slice` takes them."""
    start = g.node("Mul", index, g.constant(size))
    end = g.node("Add", start, g.constant(size))
    return g.node("Unsqueeze", start, g.constant([0])), g.node("Unsqueeze", end, g.constant([0]))


_POOLINGS: dict[Pooling, Callable[[Packing, str], str]] = {
    Pooling.MEAN: Packing.mean,
    Pooling.CLS: Packing.first,
    Pooling.LAST: Packing.last,
    Pooling.SPLADE: Packing.largest,
}
