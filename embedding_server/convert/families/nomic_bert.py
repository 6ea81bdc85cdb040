"""NomicBERT (Nussbaum et al. 2024): BERT with rotary positions and SwiGLU.

Tensors and settings are called as nomic's own code does, or as transformers 5 does; a config.json
may have both sets.
"""

from typing import Any

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.families.gte import NATIVE, Layers, Names, layer
from embedding_server.convert.packing import Rotary
from embedding_server.convert.rope import rope

_ORIGINAL = Names(
    ("attn.Wqkv",), "attn.out_proj", "norm1", ("mlp.fc11", "mlp.fc12"), "mlp.fc2", "norm2"
)
_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


def encoder(net: Net) -> str:
    """Token states."""
    _expect(net)
    original = "emb_ln.weight" in net.weights
    heads, epsilon = _either(net, "n_head", "num_attention_heads"), _epsilon(net)
    prefix, names = ("encoder.layers", _ORIGINAL) if original else ("layers", NATIVE)
    layers = Layers(names, heads, epsilon, _activation(net), _rotary(net, heads))
    norm = "emb_ln" if original else "embeddings.LayerNorm"
    x = net.layer(0, net.norm(norm, net.tokens(), epsilon))
    for index in range(_either(net, "n_layer", "num_hidden_layers")):
        x = net.layer(index + 1, layer(net, f"{prefix}.{index}", x, layers))
    return x


def _expect(net: Net) -> None:
    """Refuse what nomic's code can do besides."""
    net.expect(
        causal=False,
        moe_every_n_layers=0,
        num_heads_kv=net.config.get("n_head"),
        parallel_block=False,
        prenorm=False,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=False,
        rotary_emb_scale_base=None,
        rotary_head_dim=False,
        rotary_scaling_factor=None,
        use_rms_norm=False,
    )


def _epsilon(net: Net) -> float:
    return float(_either(net, "layer_norm_epsilon", "layer_norm_eps"))


def _activation(net: Net) -> str:
    gated = net.config.get("activation_function")
    if gated is None:
        return str(net.config["hidden_act"])
    if gated not in _ACTIVATIONS:
        raise ConvertError(f"activation_function={gated!r} in config.json is not supported")
    return _ACTIVATIONS[gated]


def _rotary(net: Net, heads: int) -> Rotary:
    config = net.config
    return rope(
        net,
        "rotary",
        config.get("rope_parameters") or {},
        theta=config.get("rotary_emb_base") or 1000.0,
        width=config.get("head_dim") or _either(net, "n_embd", "hidden_size") // heads,
        # nomic's n_positions is how far it can be used, transformers' how far it was trained.
        positions=_either(net, "n_positions", "max_position_embeddings"),
    )


def _either(net: Net, original: str, native: str) -> Any:
    """A setting by its name in nomic's code, or in transformers."""
    found = net.config.get(original)
    return net.config[native] if found is None else found


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    prefix = "cls.predictions.transform"
    (changed,) = net.project(states, f"{prefix}.dense")
    changed = net.norm(
        f"{prefix}.layer_norm", net.activate(_activation(net), changed), _epsilon(net)
    )
    return net.tied(changed, WORDS, "cls.predictions.bias")
