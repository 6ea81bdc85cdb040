"""BERT (Devlin et al. 2018): learned positions, post-layer-norm."""

from embedding_server.convert.blocks import Net


def encoder(net: Net) -> str:
    """Token states; without pairs all tokens belong to segment 0, which joins the positions."""
    config, weights = net.config, net.weights
    net.expect(position_embedding_type="absolute")
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    table = weights("embeddings.position_embeddings.weight")
    kinds = "embeddings.token_type_embeddings.weight"
    if not net.packing.segments:
        table = table + weights(kinds)[0]
    x = net.add(
        net.embed("embeddings.word_embeddings.weight", net.packing.ids),
        net.embed("embeddings.position_embeddings.weight", net.packing.positions, table),
    )
    if net.packing.segments:
        x = net.add(x, net.embed(kinds, net.packing.segments))
    x = net.norm("embeddings.LayerNorm", x, epsilon)
    for index in range(config["num_hidden_layers"]):
        x = _layer(net, f"encoder.layer.{index}", x, heads, epsilon)
    return x


def _layer(net: Net, layer: str, x: str, heads: int, epsilon: float) -> str:
    inner = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    query, key, value = net.project(x, *inner)
    attended = net.packing.attention(query, key, value, heads)
    (dense,) = net.project(attended, f"{layer}.attention.output.dense")
    x = net.norm(f"{layer}.attention.output.LayerNorm", net.add(dense, x), epsilon)
    (wide,) = net.project(x, f"{layer}.intermediate.dense")
    (dense,) = net.project(net.activate(net.config["hidden_act"], wide), f"{layer}.output.dense")
    return net.norm(f"{layer}.output.LayerNorm", net.add(dense, x), epsilon)


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
    return net.tied(changed, "embeddings.word_embeddings.weight", "cls.predictions.bias")
