"""ELECTRA (Clark et al. 2020): BERT, with embeddings that may be narrower than the layers."""

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.families import bert


def encoder(net: Net) -> str:
    """Token states."""
    x = bert.embedded(net)
    if "embeddings_project.weight" in net.weights:
        (x,) = net.project(x, "embeddings_project")
    return bert.layers(net, x)


def classifier(net: Net, states: str) -> str:
    """Scores from the first token's state, through a GELU layer."""
    (dense,) = net.project(net.packing.first(states), "classifier.dense")
    (scores,) = net.project(net.activate("gelu", dense), "classifier.out_proj")
    return scores


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    (changed,) = net.project(states, "generator_predictions.dense")
    changed = net.activate("gelu", changed)
    changed = net.norm("generator_predictions.LayerNorm", changed, net.config["layer_norm_eps"])
    return net.tied(changed, WORDS, "generator_lm_head.bias")
