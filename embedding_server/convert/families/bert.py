"""BERT (Devlin et al. 2018): learned positions, post-layer-norm, one segment per text."""

from typing import Any

from embedding_server.convert.blocks import (
    Packing,
    Weights,
    activation,
    embedding,
    layer_norm,
    linear,
)
from embedding_server.convert.graph import Graph


def encoder(g: Graph, weights: Weights, config: dict[str, Any], packing: Packing, ids: str) -> str:
    """Token states of a BERT encoder; all tokens belong to segment 0, which joins the positions."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    activate = activation(config["hidden_act"])
    words = weights("embeddings.word_embeddings.weight")
    positions = weights("embeddings.position_embeddings.weight")
    segment = weights("embeddings.token_type_embeddings.weight")[0]
    x = g.node(
        "Add",
        embedding(g, "embeddings.words", words, ids),
        embedding(g, "embeddings.positions", positions + segment, packing.positions),
    )
    x = layer_norm(g, weights, "embeddings.LayerNorm", x, epsilon)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        query, key, value = (
            linear(g, weights, f"{layer}.attention.self.{part}", x)
            for part in ("query", "key", "value")
        )
        attended = packing.attention(query, key, value, heads)
        dense = linear(g, weights, f"{layer}.attention.output.dense", attended)
        x = g.node("Add", dense, x)
        x = layer_norm(g, weights, f"{layer}.attention.output.LayerNorm", x, epsilon)
        wide = activate(g, linear(g, weights, f"{layer}.intermediate.dense", x))
        x = g.node("Add", linear(g, weights, f"{layer}.output.dense", wide), x)
        x = layer_norm(g, weights, f"{layer}.output.LayerNorm", x, epsilon)
    return x
