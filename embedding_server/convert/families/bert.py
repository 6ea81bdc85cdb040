"""BERT (Devlin et al. 2018): learned positions, post-layer-norm."""

import msgspec

from embedding_server.convert.blocks import SEGMENTS, WORDS, Net
from embedding_server.convert.packing import Bias

POSITIONS = "embeddings.position_embeddings.weight"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that normalises behind each block, and what its tensors are called below its name."""

    heads: int
    epsilon: float
    activation: str
    bias: Bias | None = None
    projections: tuple[str, ...] = tuple(f"attention.self.{a}" for a in ("query", "key", "value"))
    attended: str = "attention.output.dense"
    attended_norm: str = "attention.output.LayerNorm"
    wide: str = "intermediate.dense"
    narrow: str = "output.dense"
    norm: str = "output.LayerNorm"

    def __call__(self, net: Net, name: str, x: str) -> str:
        """States after the layer of that name."""
        query, key, value = net.project(x, *(f"{name}.{part}" for part in self.projections))
        attended = net.packing.attention(query, key, value, self.heads, self.bias)
        (dense,) = net.project(attended, f"{name}.{self.attended}")
        x = net.norm(f"{name}.{self.attended_norm}", net.add(dense, x), self.epsilon)
        (wide,) = net.project(x, f"{name}.{self.wide}")
        (dense,) = net.project(net.activate(self.activation, wide), f"{name}.{self.narrow}")
        return net.norm(f"{name}.{self.norm}", net.add(dense, x), self.epsilon)


def encoder(net: Net) -> str:
    """Token states."""
    return layers(net, embedded(net))


def embedded(net: Net, first: int = 0) -> str:
    """Words, positions that begin at `first`, and segments.

    Without pairs all tokens belong to segment 0, which joins the positions.
    """
    net.expect(position_embedding_type="absolute")
    weights, segments = net.weights, net.packing.segments
    table = weights(POSITIONS)[first:]
    if not segments:
        table = table + weights(SEGMENTS)[0]
    x = net.add(
        net.embed(WORDS, net.packing.ids), net.embed(POSITIONS, net.packing.positions, table)
    )
    if segments:
        x = net.add(x, net.embed(SEGMENTS, segments))
    return net.norm("embeddings.LayerNorm", x, net.config["layer_norm_eps"])


def layers(net: Net, x: str) -> str:
    """States after all layers."""
    net.expect(is_decoder=False)
    config = net.config
    layer = Layer(
        heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
        activation=config["hidden_act"],
    )
    x = net.layer(0, x)
    for index in range(config["num_hidden_layers"]):
        x = net.layer(index + 1, layer(net, f"encoder.layer.{index}", x))
    return x


def classifier(net: Net, states: str) -> str:
    """Scores of a pair from the first token's state, through BERT's pooler."""
    (pooled,) = net.project(net.packing.first(states), "pooler.dense")
    (scores,) = net.project(net.activate("tanh", pooled), "classifier")
    return scores


def words(net: Net, states: str) -> str:
    """Logits of the vocabulary for every token; the output table is the input's."""
    prefix = "cls.predictions.transform"
    (changed,) = net.project(states, f"{prefix}.dense")
    changed = net.activate(net.config["hidden_act"], changed)
    changed = net.norm(f"{prefix}.LayerNorm", changed, net.config["layer_norm_eps"])
    return net.tied(changed, WORDS, "cls.predictions.bias")
