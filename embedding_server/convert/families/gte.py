"""GTE's "new" architecture (Zhang et al. 2024, mGTE): BERT with rotary positions and a gated block.

Layers are normalised after each block. Tensors are called as Alibaba's own code does, or as
transformers 5 does. NomicBERT has the same layers under other names.
"""

import msgspec

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.packing import Rotary
from embedding_server.convert.rope import rope


class Names(msgspec.Struct, frozen=True):
    """What the parts of a layer are called; several that share their input may be one tensor."""

    qkv: tuple[str, ...]
    output: str
    attention_norm: str
    up_gate: tuple[str, ...]
    down: str
    mlp_norm: str


class Layers(msgspec.Struct, frozen=True):
    """What all layers of a model have in common."""

    names: Names
    heads: int
    epsilon: float
    activation: str
    rotary: Rotary


NATIVE = Names(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    "post_attention_layernorm",
    ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj",
    "post_mlp_layernorm",
)
_PACKED = Names(
    ("attention.qkv_proj",),
    "attention.o_proj",
    "attn_ln",
    ("mlp.up_gate_proj",),
    "mlp.down_proj",
    "mlp_ln",
)


def encoder(net: Net) -> str:
    """Token states."""
    config, native = net.config, "layers.0.self_attn.q_proj.weight" in net.weights
    net.expect(
        position_embedding_type="rope",
        layer_norm_type="layer_norm",
        logn_attention_scale=False,
        logn_attention_clip1=False,
        pack_qkv=True,
    )
    prefix, names = ("layers", NATIVE) if native else ("encoder.layer", _PACKED)
    epsilon = config["layer_norm_eps"]
    layers = Layers(
        names, config["num_attention_heads"], epsilon, config["hidden_act"], _rotary(net)
    )
    x = net.layer(0, net.norm("embeddings.LayerNorm", net.tokens(), epsilon))
    for index in range(config["num_hidden_layers"]):
        x = net.layer(index + 1, layer(net, f"{prefix}.{index}", x, layers))
    return x


def layer(net: Net, prefix: str, x: str, like: Layers) -> str:
    """Attention and a gated feed-forward block, each followed by a norm."""
    names, packing = like.names, net.packing
    query, key, value = net.fused(x, *(f"{prefix}.{name}" for name in names.qkv), parts=3)
    query, key = (packing.rotated(one, like.heads, like.rotary) for one in (query, key))
    attended = packing.attention(query, key, value, like.heads)
    (dense,) = net.project(attended, f"{prefix}.{names.output}")
    x = net.norm(f"{prefix}.{names.attention_norm}", net.add(dense, x), like.epsilon)
    up, gate = net.fused(x, *(f"{prefix}.{name}" for name in names.up_gate), parts=2)
    gated = net.graph.node("Mul", net.activate(like.activation, gate), up)
    (dense,) = net.project(gated, f"{prefix}.{names.down}")
    return net.norm(f"{prefix}.{names.mlp_norm}", net.add(dense, x), like.epsilon)


def _rotary(net: Net) -> Rotary:
    config = net.config
    return rope(
        net,
        "rotary",
        config.get("rope_parameters") or config.get("rope_scaling") or {},
        theta=config.get("rope_theta") or 10_000.0,
        width=config["hidden_size"] // config["num_attention_heads"],
        positions=config["max_position_embeddings"],
    )


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    norm = "lm_head.norm" if "lm_head.norm.weight" in net.weights else "lm_head.layer_norm"
    (changed,) = net.project(states, "lm_head.dense")
    changed = net.activate(net.config["hidden_act"], changed)
    changed = net.norm(norm, changed, net.config["layer_norm_eps"])
    return net.tied(changed, WORDS, "lm_head.decoder.bias")
