"""Jina BERT v2 (Guenther et al. 2023): BERT with ALiBi in place of positions, and a gated block.

The model for code normalises queries and keys too, and the attended states twice. It calls its
gated block otherwise, in which the second half is activated, not the first.
"""

import math

import numpy as np

from embedding_server.convert.blocks import Net
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Graph
from embedding_server.convert.packing import Bias, distances

_ACTIVATIONS = {"geglu": "gelu", "reglu": "relu"}


def encoder(net: Net) -> str:
    """Token states."""
    config = net.config
    net.expect(position_embedding_type="alibi")
    epsilon, alibi = config["layer_norm_eps"], falling(config["num_attention_heads"])
    x = net.layer(0, net.norm("embeddings.LayerNorm", net.tokens(), epsilon))
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        x = _attended(net, layer, x, alibi, epsilon)
        x = net.layer(index + 1, _gated(net, layer, x, epsilon))
    return x


def _attended(net: Net, layer: str, x: str, alibi: Bias, epsilon: float) -> str:
    inner = f"{layer}.attention.self"
    query, key, value = net.project(x, *(f"{inner}.{one}" for one in ("query", "key", "value")))
    if f"{inner}.layer_norm_q.weight" in net.weights:
        query = net.norm(f"{inner}.layer_norm_q", query, epsilon)
        key = net.norm(f"{inner}.layer_norm_k", key, epsilon)
    attended = net.packing.attention(query, key, value, net.config["num_attention_heads"], alibi)
    (dense,) = net.project(attended, f"{layer}.attention.output.dense")
    attended = net.norm(f"{layer}.attention.output.LayerNorm", net.add(dense, x), epsilon)
    if f"{layer}.layer_norm_1.weight" in net.weights:
        attended = net.norm(f"{layer}.layer_norm_1", net.add(attended, x), epsilon)
    return attended


def _gated(net: Net, layer: str, x: str, epsilon: float) -> str:
    code = f"{layer}.mlp.up_gated_layer.weight" in net.weights
    names = ("up_gated_layer", "down_layer") if code else ("gated_layers", "wo")
    first, second = net.fused(x, f"{layer}.mlp.{names[0]}", parts=2)
    gate, up = (second, first) if code else (first, second)
    wide = net.graph.node("Mul", net.activate(_activation(net), gate), up)
    (dense,) = net.project(wide, f"{layer}.mlp.{names[1]}")
    norm = "layer_norm_2" if code else "mlp.layernorm"
    return net.norm(f"{layer}.{norm}", net.add(dense, x), epsilon)


def _activation(net: Net) -> str:
    kind = net.config["feed_forward_type"]
    if kind not in _ACTIVATIONS:
        raise ConvertError(f"feed_forward_type={kind!r} in config.json is not supported")
    return _ACTIVATIONS[kind]


def falling(heads: int) -> Bias:
    """ALiBi (Press et al. 2022) on both sides: scores fall with the distance, by head."""
    falls = -np.array(slopes(heads), np.float32)[:, None, None]

    def bias(g: Graph, queries: str, keys: str) -> str:
        apart = g.node("CastLike", distances(g, queries, keys), g.constant(0.0))
        return g.node("Unsqueeze", g.node("Mul", apart, g.constant(falls)), g.constant([0]))

    return bias


def slopes(heads: int) -> list[float]:
    """A geometric series from 2 ** (-8 / heads), if that is a power of two.

    Else that of the next lower power, and of the next higher one every other, as many as it takes.
    """
    power = 1 << int(math.log2(heads))
    series = [2.0 ** (-8 * step / power) for step in range(1, power + 1)]
    return series if power == heads else series + slopes(2 * power)[::2][: heads - power]
