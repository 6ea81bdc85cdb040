"""Qwen3 and Qwen2 (Yang et al. 2025, 2024): causal decoders as encoders.

Grouped heads, rotary positions, RMS norm before each block, a gated feed-forward block; Qwen3
normalises queries and keys per head, Qwen2 has biases in their place.
"""

from embedding_server.convert.blocks import Net
from embedding_server.convert.packing import Heads, Rotary
from embedding_server.convert.rope import rope


def encoder(net: Net) -> str:
    """Token states; no token sees those behind it."""
    config = net.config
    net.expect(use_sliding_window=False)
    count = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // count
    heads = Heads(count, config["num_key_value_heads"], width)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary = rope(
        net,
        "rotary",
        given,
        theta=given.get("rope_theta") or config["rope_theta"],
        width=width,
        positions=config["max_position_embeddings"],
    )
    x = net.embed("embed_tokens.weight", net.packing.ids)
    for index in range(config["num_hidden_layers"]):
        x = _layer(net, f"layers.{index}", net.layer(index, x), heads, rotary)
    # The last state is the normalised one, in transformers too.
    return net.layer(config["num_hidden_layers"], net.rms_norm("norm", x, config["rms_norm_eps"]))


def _layer(net: Net, layer: str, x: str, heads: Heads, rotary: Rotary) -> str:
    epsilon = net.config["rms_norm_eps"]
    inner = net.rms_norm(f"{layer}.input_layernorm", x, epsilon)
    projections = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    query, key, value = net.project(inner, *projections)
    query = _turned(net, f"{layer}.self_attn.q_norm", query, heads.query, rotary)
    key = _turned(net, f"{layer}.self_attn.k_norm", key, heads.kv, rotary)
    attended = net.packing.causal(query, key, value, heads)
    (dense,) = net.project(attended, f"{layer}.self_attn.o_proj")
    x = net.add(x, dense)
    inner = net.rms_norm(f"{layer}.post_attention_layernorm", x, epsilon)
    gate, up = net.project(inner, f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    gated = net.graph.node("Mul", net.activate(net.config["hidden_act"], gate), up)
    (dense,) = net.project(gated, f"{layer}.mlp.down_proj")
    return net.add(x, dense)


def _turned(net: Net, norm: str, states: str, heads: int, rotary: Rotary) -> str:
    """Query or key states, each head normalised where the model does so, by position."""
    g = net.graph
    if f"{norm}.weight" in net.weights:
        by_head = g.node("Reshape", states, g.constant([0, heads, -1]))
        by_head = net.rms_norm(norm, by_head, net.config["rms_norm_eps"])
        states = g.node("Flatten", by_head, axis=1)
    return net.packing.rotated(states, heads, rotary)


def classifier(net: Net, states: str) -> str:
    """Scores from the last token's state."""
    (scores,) = net.project(net.packing.last(states), "score")
    return scores


def judge(net: Net, states: str) -> str:
    """How much rather the text goes on with "yes" than with "no": the difference of their logits.

    That is the score of Qwen3-Reranker (Zhang et al. 2025), as log-odds.
    """
    g, weights = net.graph, net.weights
    table = "lm_head.weight" if "lm_head.weight" in weights else "embed_tokens.weight"
    yes, no = (net.token(word) for word in ("yes", "no"))
    difference = weights.rows(table, yes, yes + 1) - weights.rows(table, no, no + 1)
    return g.node("MatMul", net.packing.last(states), g.weight("judge", difference.T))
