"""What is known of families of published models: how short their vectors may be."""

import msgspec
import pytest

from embedding_server.catalog.overrides import overridden
from embedding_server.catalog.published import published_models
from embedding_server.core import Overrides

SHORTEST = {
    "nomic-ai/nomic-embed-text-v1.5": 64,
    "nomic-ai/nomic-embed-text-v1.5-Q": 64,
    "lightonai/modernbert-embed-large": 256,
    "Qwen/Qwen3-Embedding-0.6B": 32,
    "Qwen/Qwen3-Embedding-0.6B-Q": 32,
    "Qwen/Qwen3-Embedding-4B": 32,
    "Qwen/Qwen3-Embedding-8B": 32,
    "google/embeddinggemma-300m": 128,
    "jinaai/jina-embeddings-v3": 32,
    "jinaai/jina-colbert-v2": 64,
}


def test_shortest_vectors() -> None:
    """Models whose publishers name the fewest dimensions have them, all others may be cut to 1."""
    models = published_models()
    assert {one.id: one.min_dimensions for one in models if one.min_dimensions != 1} == SHORTEST
    assert all(one.min_dimensions < one.dimensions for one in models if one.dimensions)


@pytest.mark.parametrize(("dimensions", "shortest"), [(16, 16), (128, 64), (None, 64)])
def test_an_operator_may_cut_shorter(dimensions: int | None, shortest: int) -> None:
    """Overrides win over what publishers say, and never leave an empty range."""
    (nomic,) = (one for one in published_models() if one.id == "nomic-ai/nomic-embed-text-v1.5")
    said = Overrides(dimensions=dimensions)
    cut = overridden(msgspec.structs.replace(nomic, overrides=said))
    assert (cut.min_dimensions, cut.dimensions) == (shortest, dimensions or 768)
    assert overridden(cut) == cut
