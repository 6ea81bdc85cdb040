"""The layout of a batch in graphs for CUDA: no padding, no loops, nothing decided on the device.

All that depends on lengths is an input, filled in by `runtime.packed`: computed in the graph it
would be a dozen small kernels, and sizes that the device knows before the host does make a run
wait. A graph declares only the inputs that it uses.

Attention of encoders is ONNX Runtime's PackedMultiHeadAttention, with a bias or without. In half
precision and without a bias it is flash attention, if query, key and value are separate and have no
bias of their own; with a bias it is CUTLASS's kernel, if the longest text counts a multiple of
16 tokens, which is why `steps` does. Decoders attend in rows, one per text, by GroupQueryAttention,
which knows no packed form and no float32.
(onnxruntime 1.31, contrib_ops/cuda/bert/packed_multihead_attention.cc, group_query_attention.cc.)
"""

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Graph
from embedding_server.convert.packing import Bias, Heads, Rotary
from embedding_server.core import Pooling

_INT32, _INT64 = TensorProto.INT32, TensorProto.INT64
_NEVER = -30_000.0
"""Added to a score it leaves nothing of it, and half precision can hold it."""


class CudaPacking:
    """A `Batch` of CUDA's operators.

    Args:
        graph: the graph to write to; it takes whatever is used of `runtime.packed.INPUTS`.
        segments: whether its texts are pairs.
    """

    def __init__(self, graph: Graph, *, segments: bool = False) -> None:
        self._graph = graph
        self._inputs: dict[str, str] = {}
        self._shared: dict[Bias, str] = {}
        self.ids = self._input("input_ids", "tokens")
        self.segments = self._input("token_type_ids", "tokens") if segments else None

    @property
    def positions(self) -> str:
        """Of every token in its text."""
        return self._input("positions", "tokens")

    def attention(
        self, query: str, key: str, value: str, heads: int, bias: Bias | None = None
    ) -> str:
        """See `Batch`."""
        if self._graph.half not in (None, np.float16):
            raise ConvertError("encoders have no attention in bf16 on CUDA: choose fp16")
        return self._graph.contrib(
            "PackedMultiHeadAttention",
            query,
            key,
            value,
            "",
            self._input("token_offset", "texts", "longest", dtype=_INT32),
            self._input("cumulative_sequence_length", "texts_and_1", dtype=_INT32),
            *([self._shared_bias(bias)] if bias else []),
            num_heads=heads,
        )

    def causal(self, query: str, key: str, value: str, heads: Heads) -> str:
        """See `Batch`."""
        if not self._graph.half:
            key, value = self._repeated(key, heads), self._repeated(value, heads)
            return self.attention(query, key, value, heads.query, _before)
        g = self._graph
        slots = self._input("slots", "texts", "longest")
        # The keys and values are outputs nobody wants, but without them the kernel crashes.
        attended, _, _ = g.contrib_outputs(
            "GroupQueryAttention",
            3,
            *(g.node("Gather", one, slots) for one in (query, key, value)),
            "",
            "",
            self._input("seqlens_k", "texts", dtype=_INT32),
            self._input("total_sequence_length", 1, dtype=_INT32),
            num_heads=heads.query,
            kv_num_heads=heads.kv,
        )
        return g.node("Gather", g.node("Flatten", attended, axis=2), self._input("rows", "tokens"))

    def rotated(self, states: str, heads: int, rotary: Rotary) -> str:
        """See `Batch`; all tokens are one row, which may be longer than the tables."""
        g = self._graph
        row, positions = (
            g.node("Unsqueeze", one, g.constant([0])) for one in (states, self.positions)
        )
        turned = g.contrib(
            "RotaryEmbedding",
            row,
            positions,
            rotary.cos,
            rotary.sin,
            num_heads=heads,
            is_packed_batching=1,
        )
        return g.node("Squeeze", turned, g.constant([0]))

    def pool(self, states: str, pooling: Pooling) -> str:
        """See `Batch`; means are float32."""
        return _POOLINGS[pooling](self, states)

    def mean(self, states: str) -> str:
        """See `Batch`."""
        return self._graph.narrow(self.exact_mean(states))

    def exact_mean(self, states: str) -> str:
        """The same as float32."""
        shares = self._input("shares", "texts", 1, dtype=TensorProto.FLOAT)
        return self._graph.node("Mul", self._scattered(states, "add"), shares)

    def largest(self, states: str) -> str:
        """See `Batch`; what is below 0 is 0, as for SPLADE, the only one that asks."""
        return self._graph.narrow(self._scattered(states, "max"))

    def first(self, states: str) -> str:
        """See `Batch`."""
        return self._graph.node("Gather", states, self._input("firsts", "texts"))

    def last(self, states: str) -> str:
        """See `Batch`."""
        return self._graph.node("Gather", states, self._input("lasts", "texts"))

    def _scattered(self, states: str, reduction: str) -> str:
        """What tokens of a text come to, beginning with 0, float32: no text is padded for it."""
        g = self._graph
        offsets = self._input("token_offset", "texts", "longest", dtype=_INT32)
        shape = g.node(
            "Concat",
            g.node("Shape", offsets, start=0, end=1),
            g.node("Shape", states, start=1, end=2),
            axis=0,
        )
        nothing = g.node("ConstantOfShape", shape)
        texts = self._input("texts_of_tokens", "tokens", 1)
        return g.node("ScatterND", nothing, texts, g.single(states), reduction=reduction)

    def _repeated(self, states: str, heads: Heads) -> str:
        """Key or value states with a head for every query head."""
        g = self._graph
        by_head = g.node("Reshape", states, g.constant([0, heads.kv, heads.width]))
        each = np.repeat(np.arange(heads.kv), heads.query // heads.kv)
        return g.node("Flatten", g.node("Gather", by_head, g.constant(each), axis=1), axis=1)

    def _shared_bias(self, bias: Bias) -> str:
        """The bias of a text as long as the longest: the same for all texts and layers."""
        if bias not in self._shared:
            steps = self._input("steps", "longest")
            self._shared[bias] = bias(self._graph, steps, steps)
        return self._shared[bias]

    def _input(self, name: str, *shape: str | int, dtype: int = _INT64) -> str:
        if name not in self._inputs:
            self._inputs[name] = self._graph.input(name, *shape, dtype=dtype)
        return name


def _before(g: Graph, queries: str, keys: str) -> str:
    """No token sees those behind it."""
    rows = g.node("Unsqueeze", queries, g.constant([1]))
    behind = g.node("Greater", g.node("Unsqueeze", keys, g.constant([0])), rows)
    hidden = g.node("Where", behind, g.constant(_NEVER), g.constant(0.0))
    return g.node("Unsqueeze", hidden, g.constant([0, 1]))


_POOLINGS: dict[Pooling, Callable[[CudaPacking, str], str]] = {
    Pooling.MEAN: CudaPacking.exact_mean,
    Pooling.CLS: CudaPacking.first,
    Pooling.LAST: CudaPacking.last,
    Pooling.SPLADE: CudaPacking.largest,
}
