"""BERT (Devlin et al. 2018): learned positions, post-layer-norm, one segment per text."""

from typing import Any

from embedding_server.convert.blocks import (
    Packing,
    Weights,
    activation,
    embedding,
    layer_norm,
)
from embedding_server.convert.graph import Graph
from embedding_server.convert.linear import Linear


def encoder(
    g: Graph, weights: Weights, linear: Linear, config: dict[str, Any], packing: Packing
) -> str:
    """Token states of a BERT encoder; all tokens belong to segment 0, which joins the positions."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    activate = activation(config["hidden_act"])
    words = weights("embeddings.word_embeddings.weight")
    positions = weights("embeddings.position_embeddings.weight")
    segment = weights("embeddings.token_type_embeddings.weight")[0]
    x = g.node(
        "Add",
        embedding(g, "embeddings.words", words, packing.ids),
        embedding(g, "embeddings.positions", positions + segment, packing.positions),
    )
    x = layer_norm(g, weights, "embeddings.LayerNorm", x, epsilon)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        inner = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        query, key, value = linear(g, weights, inner, x)
        attended = packing.attention(query, key, value, heads)
        (dense,) = linear(g, weights, [f"{layer}.attention.output.dense"], attended)
        x = g.node("Add", dense, x)
        x = layer_norm(g, weights, f"{layer}.attention.output.LayerNorm", x, epsilon)
        (wide,) = linear(g, weights, [f"{layer}.intermediate.dense"], x)
        (dense,) = linear(g, weights, [f"{layer}.output.dense"], activate(g, wide))
        x = g.node("Add", dense, x)
        x = layer_norm(g, weights, f"{layer}.output.LayerNorm", x, epsilon)
    return x
