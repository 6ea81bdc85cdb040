"""ModernBERT (Warner et al. 2024): pre-norm, gated feed-forward, attention that is mostly local.

Every n-th layer attends to all of the text, the others to a window around each token; the two kinds
have rotary positions of their own.
"""

from collections.abc import Callable
from typing import Any

from embedding_server.convert.blocks import Net
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.graph import Graph
from embedding_server.convert.packing import Batch, Bias, Rotary, distances
from embedding_server.convert.rope import rope

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_EVERY = 3
_THETAS = {_GLOBAL: ("global_rope_theta", 160_000.0), _LOCAL: ("local_rope_theta", 10_000.0)}
"""Kind of layer -> what its theta was called before transformers 5, and what it is by default."""
_NEVER = -30_000.0
"""Added to a score it leaves nothing of it, and half precision can hold it."""
_POOLINGS: dict[str, Callable[[Batch, str], str]] = {
    "cls": lambda batch, states: batch.first(states),
    "mean": lambda batch, states: batch.mean(states),
}


def encoder(net: Net) -> str:
    """Token states."""
    config = net.config
    kinds = _layer_types(config)
    rotaries = {kind: _rotary(net, kind) for kind in sorted(set(kinds))}
    biases = {_GLOBAL: None, _LOCAL: within(config["local_attention"] // 2)}
    x = net.embed("embeddings.tok_embeddings.weight", net.packing.ids)
    x = _norm(net, "embeddings.norm", x)
    for index, kind in enumerate(kinds):
        x = _layer(net, f"layers.{index}", net.layer(index, x), rotaries[kind], biases[kind])
    # The last state is the normalised one, in transformers too.
    return net.layer(len(kinds), _norm(net, "final_norm", x))


def _layer(net: Net, layer: str, x: str, rotary: Rotary, bias: Bias | None) -> str:
    heads, packing = net.config["num_attention_heads"], net.packing
    # The first layer's input is normalised already.
    first = f"{layer}.attn_norm.weight" not in net.weights
    inner = x if first else _norm(net, f"{layer}.attn_norm", x)
    query, key, value = net.fused(inner, f"{layer}.attn.Wqkv", parts=3)
    query, key = (packing.rotated(one, heads, rotary) for one in (query, key))
    (dense,) = net.project(packing.attention(query, key, value, heads, bias), f"{layer}.attn.Wo")
    x = net.add(x, dense)
    inner = _norm(net, f"{layer}.mlp_norm", x)
    changed, gate = net.fused(inner, f"{layer}.mlp.Wi", parts=2)
    gated = net.graph.node("Mul", net.activate(net.config["hidden_activation"], changed), gate)
    (dense,) = net.project(gated, f"{layer}.mlp.Wo")
    return net.add(x, dense)


def _norm(net: Net, name: str, x: str) -> str:
    return net.norm(name, x, net.config["norm_eps"])


def _layer_types(config: dict[str, Any]) -> list[str]:
    every = config.get("global_attn_every_n_layers") or _EVERY
    by_rule = [_LOCAL if index % every else _GLOBAL for index in range(config["num_hidden_layers"])]
    types: list[str] = config.get("layer_types") or by_rule
    if len(types) != len(by_rule) or not set(types) <= set(_THETAS):
        raise ConvertError(f"layer_types={types!r} in config.json is not supported")
    return types


def _rotary(net: Net, kind: str) -> Rotary:
    config, (key, theta) = net.config, _THETAS[kind]
    return rope(
        net,
        f"rotary.{kind}",
        (config.get("rope_parameters") or {}).get(kind) or {},
        theta=config.get(key) or theta,
        width=config["hidden_size"] // config["num_attention_heads"],
        positions=config["max_position_embeddings"],
    )


def within(window: int) -> Bias:
    """Tokens see those that are so far away, on both sides, and no others."""

    def bias(g: Graph, queries: str, keys: str) -> str:
        far = g.node("Greater", distances(g, queries, keys), g.constant(window))
        hidden = g.node("Where", far, g.constant(_NEVER), g.constant(0.0))
        return g.node("Unsqueeze", hidden, g.constant([0, 1]))

    return bias


def classifier(net: Net, states: str) -> str:
    """Scores from the first token's state, or the mean of all."""
    pooling = net.config.get("classifier_pooling") or "cls"
    if pooling not in _POOLINGS:
        raise ConvertError(f"classifier_pooling={pooling!r} in config.json is not supported")
    (scores,) = net.project(_head(net, _POOLINGS[pooling](net.packing, states)), "classifier")
    return scores


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    return net.tied(_head(net, states), "embeddings.tok_embeddings.weight", "decoder.bias")


def _head(net: Net, states: str) -> str:
    (dense,) = net.project(states, "head.dense")
    return _norm(net, "head.norm", net.activate(net.config["classifier_activation"], dense))
