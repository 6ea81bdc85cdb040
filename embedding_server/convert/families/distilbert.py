"""DistilBERT (Sanh et al. 2019): BERT without segments and pooler, under other names."""

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.families import bert

_EPSILON = 1e-12


def encoder(net: Net) -> str:
    """Token states."""
    config = net.config
    layer = bert.Layer(
        heads=config["n_heads"],
        epsilon=_EPSILON,
        activation=config["activation"],
        projections=tuple(f"attention.{part}_lin" for part in "qkv"),
        attended="attention.out_lin",
        attended_norm="sa_layer_norm",
        wide="ffn.lin1",
        narrow="ffn.lin2",
        norm="output_layer_norm",
    )
    x = net.add(net.embed(WORDS, net.packing.ids), net.embed(bert.POSITIONS, net.packing.positions))
    x = net.layer(0, net.norm("embeddings.LayerNorm", x, _EPSILON))
    for index in range(config["n_layers"]):
        x = net.layer(index + 1, layer(net, f"transformer.layer.{index}", x))
    return x


def classifier(net: Net, states: str) -> str:
    """Scores from the first token's state, through a ReLU layer."""
    (dense,) = net.project(net.packing.first(states), "pre_classifier")
    (scores,) = net.project(net.activate("relu", dense), "classifier")
    return scores


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    (changed,) = net.project(states, "vocab_transform")
    changed = net.activate(net.config["activation"], changed)
    changed = net.norm("vocab_layer_norm", changed, _EPSILON)
    return net.tied(changed, WORDS, "vocab_projector.bias")
