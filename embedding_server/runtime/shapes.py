"""Which sizes of a graph's inputs change with the batch: TensorRT wants their bounds beforehand."""

from collections.abc import Mapping
from pathlib import Path

import onnx

from embedding_server.runtime.providers import Bucket

_TEXTS, _TOKENS = 256, (1, 128, 512)
_AXES: Mapping[int, tuple[str, ...]] = {1: ("all",), 2: ("texts", "tokens"), 4: ("texts",)}
"""By how many axes an input has: packed ids, padded ids, images; others do not change."""


def changing(graph: Path) -> dict[str, tuple[str | int, ...]]:
    """Inputs with an axis that changes: `texts`, `tokens`, `all` tokens of all texts, or a size."""
    found = {}
    for value in onnx.load(graph, load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        # Packed graphs have one length per text.
        names = ("texts",) if value.name == "lengths" else _AXES.get(len(dims), ())
        axes = tuple(
            one.dim_value if one.HasField("dim_value") or index >= len(names) else names[index]
            for index, one in enumerate(dims)
        )
        if any(isinstance(axis, str) for axis in axes):
            found[value.name] = axes
    return found


def buckets(max_tokens: int) -> tuple[Bucket, ...]:
    """Sizes of batches, smallest first; the last is the greatest in texts and in tokens."""
    least, usual, most = (min(tokens, max_tokens) for tokens in _TOKENS)
    return Bucket(1, least), Bucket(_TEXTS // 8, usual), Bucket(_TEXTS, max(most, max_tokens))
