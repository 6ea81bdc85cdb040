"""Jina BERT v2 in torch: transformers has no such class.

Written from the paper (Guenther et al. 2023, https://arxiv.org/abs/2310.19923) and from what is
published of the checkpoints' tensors: BERT, ALiBi on both sides of a token, a gated feed-forward
block. With `code` it is jina-embeddings-v2-base-code's, which normalises queries, keys and the
attended states too. Parameters are called like the tensors of a checkpoint.
"""

from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, linear, softmax


class Jina:
    """Called with ids and segments (tokens,) it gives states, scores, or words' logits."""

    def __init__(self, config: dict[str, Any], head: str, *, code: bool) -> None:
        self.config, self.head, self.code = config, head, code
        self.weights: dict[str, torch.Tensor] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint."""
        c, prefix = self.config, "bert." if self.head else ""
        hidden, wide, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
        shapes: dict[str, tuple[int, ...]] = {}
        shapes["embeddings.word_embeddings.weight"] = (c["vocab_size"], hidden)
        shapes["embeddings.token_type_embeddings.weight"] = (2, hidden)
        shapes |= _vectors("embeddings.LayerNorm", hidden)
        for index in range(layers):
            layer = f"encoder.layer.{index}"
            for one in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= _matrix(f"{layer}.attention.{one}", hidden, hidden)
            norms = ["attention.output.LayerNorm", "mlp.layernorm"]
            if self.code:
                norms = ["attention.self.layer_norm_q", "attention.self.layer_norm_k", norms[0]]
                norms += ["layer_norm_1", "layer_norm_2"]
            for one in norms:
                shapes |= _vectors(f"{layer}.{one}", hidden)
            up, down = ("up_gated_layer", "down_layer") if self.code else ("gated_layers", "wo")
            shapes[f"{layer}.mlp.{up}.weight"] = (2 * wide, hidden)
            shapes |= _matrix(f"{layer}.mlp.{down}", hidden, wide)
        if self.head == "classifier":
            shapes |= _matrix("pooler.dense", hidden, hidden)
        shapes = {prefix + name: shape for name, shape in shapes.items()}
        if self.head == "classifier":
            shapes |= _matrix("classifier", c["num_labels"], hidden)
        if self.head == "words":
            shapes |= _matrix("cls.predictions.transform.dense", hidden, hidden)
            shapes |= _vectors("cls.predictions.transform.LayerNorm", hidden)
            shapes["cls.predictions.bias"] = (c["vocab_size"],)
        return shapes

    def __call__(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """See the class."""
        w = {name.removeprefix("bert."): value for name, value in self.weights.items()}
        words = w["embeddings.word_embeddings.weight"]
        x = words[ids] + w["embeddings.token_type_embeddings.weight"][kinds]
        x = self._norm(w, "embeddings.LayerNorm", x)
        for index in range(self.config["num_hidden_layers"]):
            x = self._layer(w, f"encoder.layer.{index}", x)
        if self.head == "classifier":
            return _linear(w, "classifier", torch.tanh(_linear(w, "pooler.dense", x[:1])))
        if self.head == "words":
            x = gelu(_linear(w, "cls.predictions.transform.dense", x))
            x = self._norm(w, "cls.predictions.transform.LayerNorm", x)
            return x @ words.T + w["cls.predictions.bias"]
        return x

    def _layer(self, w: dict[str, torch.Tensor], layer: str, x: torch.Tensor) -> torch.Tensor:
        parts = ("query", "key", "value")
        q, k, v = (_linear(w, f"{layer}.attention.self.{one}", x) for one in parts)
        if self.code:
            q = self._norm(w, f"{layer}.attention.self.layer_norm_q", q)
            k = self._norm(w, f"{layer}.attention.self.layer_norm_k", k)
        attended = _linear(w, f"{layer}.attention.output.dense", self._attend(q, k, v))
        attended = self._norm(w, f"{layer}.attention.output.LayerNorm", attended + x)
        if self.code:
            x = self._norm(w, f"{layer}.layer_norm_1", attended + x)
            up, gate = linear(x, w[f"{layer}.mlp.up_gated_layer.weight"]).chunk(2, dim=-1)
            down = _linear(w, f"{layer}.mlp.down_layer", up * self._act(gate))
            return self._norm(w, f"{layer}.layer_norm_2", down + x)
        gate, up = linear(attended, w[f"{layer}.mlp.gated_layers.weight"]).chunk(2, dim=-1)
        down = _linear(w, f"{layer}.mlp.wo", self._act(gate) * up)
        return self._norm(w, f"{layer}.mlp.layernorm", down + attended)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        count = self.config["num_attention_heads"]
        q, k, v = (one.unflatten(-1, (count, -1)).transpose(0, 1) for one in (q, k, v))
        at = torch.arange(q.shape[1])
        apart = (at[:, None] - at[None, :]).abs()
        falls = torch.tensor(_SLOPES[count])[:, None, None] * apart
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 - falls
        return (softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1)

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if self.config["feed_forward_type"] == "reglu" else gelu(x)

    def _norm(self, w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        epsilon = self.config["layer_norm_eps"]
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)


_SLOPES = {
    4: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8],
    6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3],
}
"""Heads -> slopes: those of 4, and for 6 every other one of 8's besides, as ALiBi's code has it."""


def _linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _matrix(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _vectors(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
