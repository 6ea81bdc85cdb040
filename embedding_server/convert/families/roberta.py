"""RoBERTa, XLM-RoBERTa, CamemBERT (Liu et al. 2019): BERT with positions behind the padding id."""

from embedding_server.convert.blocks import WORDS, Net
from embedding_server.convert.families import bert


def encoder(net: Net) -> str:
    """Token states; no text tells the parts of a pair apart."""
    pad = net.config.get("pad_token_id")
    return bert.layers(net, bert.embedded(net, 2 if pad is None else pad + 1))


def classifier(net: Net, states: str) -> str:
    """Scores from the first token's state, through a tanh layer."""
    (dense,) = net.project(net.packing.first(states), "classifier.dense")
    (scores,) = net.project(net.activate("tanh", dense), "classifier.out_proj")
    return scores


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    (changed,) = net.project(states, "lm_head.dense")
    changed = net.activate("gelu", changed)
    changed = net.norm("lm_head.layer_norm", changed, net.config["layer_norm_eps"])
    return net.tied(changed, WORDS, "lm_head.bias")
