"""MPNet (Song et al. 2020): BERT without segments, biased by how far tokens are apart."""

import math

import numpy as np
from numpy.typing import NDArray

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.families import bert
from embedding_server.convert.graph import Graph
from embedding_server.convert.packing import Bias

_FIRST = 2
"""Positions begin behind the padding id, which is 1."""
_BUCKETS, _FARTHEST = 32, 128


def encoder(net: Net) -> str:
    """Token states; the bias is the same in every layer."""
    config = net.config
    net.expect(relative_attention_num_buckets=_BUCKETS, pad_token_id=_FIRST - 1)
    positions = net.weights(bert.POSITIONS)[_FIRST:]
    x = net.add(
        net.embed(WORDS, net.packing.ids),
        net.embed(bert.POSITIONS, net.packing.positions, positions),
    )
    x = net.layer(0, net.norm("embeddings.LayerNorm", x, config["layer_norm_eps"]))
    layer = bert.Layer(
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
        activation=config["hidden_act"],
        bias=_bias(net, len(positions)),
        projections=tuple(f"attention.attn.{part}" for part in "qkv"),
        attended="attention.attn.o",
        attended_norm="attention.LayerNorm",
    )
    for index in range(config["num_hidden_layers"]):
        x = net.layer(index + 1, layer(net, f"encoder.layer.{index}", x))
    return x


def _bias(net: Net, longest: int) -> Bias:
    """A learned number per head and bucket of distances."""
    name = "encoder.relative_attention_bias.weight"
    buckets = bucket_of(np.arange(1 - longest, longest))
    table = net.graph.weight(name, net.weights(name)[buckets])

    def bias(g: Graph, queries: str, keys: str) -> str:
        shifted = g.node("Add", keys, g.constant(longest - 1))
        apart = g.node("Sub", shifted, g.node("Unsqueeze", queries, g.constant([1])))
        # Rows of all heads, turned: eight times as fast as numbers one by one.
        by_head = g.node("Transpose", g.node("Gather", table, apart), perm=[2, 0, 1])
        return g.node("Unsqueeze", by_head, g.constant([0]))

    return bias


def bucket_of(apart: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of key position - query position: exact if near, logarithmic if far.

    As in T5 (Raffel et al. 2020), half of the buckets for each direction.
    """
    half, near = _BUCKETS // 2, _BUCKETS // 4
    distance = np.abs(apart)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / near) / math.log(_FARTHEST / near)
    far = np.minimum(near + (ratio * (half - near)).astype(np.int64), half - 1)
    bucket: NDArray[np.int64] = np.where(distance < near, distance, far) + half * (apart > 0)
    return bucket
