"""What is known of published models beside their files: prompts, markers, shortest vectors."""

import string

import msgspec
import pytest

from embedding_server.catalog.overrides import overridden
from embedding_server.catalog.published import published_models
from embedding_server.core import Markers, Overrides

QUESTION = {"query": "Represent this sentence for searching relevant passages: "}
PASSAGE = {"query": "query: ", "document": "passage: "}
SEARCH = {"query": "search_query: ", "document": "search_document: "}
INSTRUCT = {
    "query": (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query"
        "\nQuery:"
    )
}
PROMPTS = {
    "intfloat/multilingual-e5-small": PASSAGE,
    "intfloat/multilingual-e5-base": PASSAGE,
    "Qdrant/multilingual-e5-large-onnx": PASSAGE,
    "Xenova/bge-small-en-v1.5": QUESTION,
    "Xenova/bge-base-en-v1.5": QUESTION,
    "Xenova/bge-large-en-v1.5": QUESTION,
    "BAAI/bge-small-en": QUESTION,
    "BAAI/bge-base-en": QUESTION,
    "BAAI/bge-small-en-v1.5": QUESTION,
    "BAAI/bge-base-en-v1.5": QUESTION,
    "BAAI/bge-large-en-v1.5": QUESTION,
    "BAAI/bge-small-zh-v1.5": {"query": "为这个句子生成表示以用于检索相关文章\uff1a"},
    "nomic-ai/nomic-embed-text-v1": SEARCH,
    "nomic-ai/nomic-embed-text-v1.5": SEARCH,
    "nomic-ai/nomic-embed-text-v1.5-Q": SEARCH,
    "lightonai/modernbert-embed-large": SEARCH,
    "mixedbread-ai/mxbai-embed-large-v1": QUESTION,
    "snowflake/snowflake-arctic-embed-xs": QUESTION,
    "snowflake/snowflake-arctic-embed-s": QUESTION,
    "Snowflake/snowflake-arctic-embed-m": QUESTION,
    "snowflake/snowflake-arctic-embed-m-long": QUESTION,
    "snowflake/snowflake-arctic-embed-l": QUESTION,
    "Qwen/Qwen3-Embedding-0.6B": INSTRUCT,
    "Qwen/Qwen3-Embedding-0.6B-Q": INSTRUCT,
    "Qwen/Qwen3-Embedding-4B": INSTRUCT,
    "Qwen/Qwen3-Embedding-8B": INSTRUCT,
    "google/embeddinggemma-300m": {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
    },
}

OBJECTS = {
    "jinaai/jina-embeddings-v3": "JinaEmbeddingV3",
    "google/siglip2-base-patch16-224": "SiglipOnnxTextEmbedding",
    "minishlab/potion-base-8M": "StaticTextEmbedding",
    "minishlab/potion-retrieval-32M": "StaticTextEmbedding",
    "minishlab/potion-multilingual-128M": "StaticTextEmbedding",
    "Qdrant/bm42-all-minilm-l6-v2-attentions": "Bm42",
    "Qdrant/bm25": "Bm25",
    "Qdrant/minicoil-v1": "MiniCOIL",
    "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte": "IfSplade",
    "Qdrant/colpali-v1.3-fp16": "ColPali",
    "Qdrant/colmodernvbert": "ColModernVBERT",
}

COLBERT = Markers(query=1, document=2, expand=32, skip=string.punctuation)
MARKERS = {
    "colbert-ir/colbertv2.0": COLBERT,
    "answerdotai/answerai-colbert-small-v1": COLBERT,
    "jinaai/jina-colbert-v2": Markers(
        query=250002,
        document=250003,
        mask="<mask>",
        expand=32,
        attend=True,
        skip=string.punctuation,
    ),
    "lightonai/LateOn": Markers(
        query=50368, document=50369, skip=string.punctuation, counted=False
    ),
    "lightonai/mLateOn": Markers(query=256000, document=256001, mask="<mask>", counted=False),
}

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


def test_prompts() -> None:
    """The families that need them have prompts, all others none."""
    assert {spec.id: spec.prompts for spec in published_models() if spec.prompts} == PROMPTS


def test_what_runs_as_an_object() -> None:
    """What is more than a graph and a pooling runs through FastEmbed's own class."""
    models = [spec for spec in published_models() if spec.fastembed]
    assert {spec.id: spec.fastembed and spec.fastembed.cls for spec in models} == OBJECTS


def test_markers() -> None:
    """Late interaction marks its texts as the models were trained."""
    models = published_models()
    assert {spec.id: spec.markers for spec in models if spec.markers} == MARKERS


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
