"""The models known by name, against tables typed from the project's list and FastEmbed's source."""

from itertools import chain

import pytest
from fastembed import (
    ImageEmbedding,
    LateInteractionMultimodalEmbedding,
    LateInteractionTextEmbedding,
    SparseTextEmbedding,
    TextEmbedding,
)
from fastembed.common.model_description import DenseModelDescription, ModelSource
from fastembed.late_interaction.token_embeddings import TokenEmbeddingsModel
from fastembed.rerank.cross_encoder import TextCrossEncoder

from embedding_server.catalog.fastembed import fastembed_models, translate
from embedding_server.catalog.published import gpu_friendly, published_models
from embedding_server.core import Kind, ModelSpec, Pooling
from embedding_server.errors import StartupError

MEAN, CLS, LAST, NONE = Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.NONE
DENSE, SPARSE, CROSS, IMAGE = Kind.DENSE, Kind.SPARSE, Kind.CROSS, Kind.IMAGE
MULTI, STATIC = Kind.MULTI, Kind.STATIC
TOKENS, SPLADE = Pooling.TOKENS, Pooling.SPLADE

ONNX = "onnx/model.onnx"
DATA = "onnx/model.onnx onnx/model.onnx_data"
INDEX = "model.safetensors.index.json"
STOPWORDS = (
    "arabic.txt danish.txt dutch.txt english.txt finnish.txt french.txt german.txt greek.txt"
    " hungarian.txt italian.txt norwegian.txt portuguese.txt romanian.txt russian.txt spanish.txt"
    " swedish.txt turkish.txt"
)

# id, kind, files, pooling, dimensions, max tokens; the repository is the id
OURS = [
    ("Qdrant/all-MiniLM-L6-v2-onnx", DENSE, "model.onnx", MEAN, 384, 512),
    ("Xenova/all-MiniLM-L12-v2", DENSE, ONNX, MEAN, 384, 512),
    ("Xenova/all-mpnet-base-v2", DENSE, ONNX, MEAN, 768, 512),
    ("Xenova/bge-small-en-v1.5", DENSE, ONNX, CLS, 384, 512),
    ("Xenova/bge-base-en-v1.5", DENSE, ONNX, CLS, 768, 512),
    ("Xenova/bge-large-en-v1.5", DENSE, ONNX, CLS, 1024, 512),
    ("nomic-ai/nomic-embed-text-v1", DENSE, ONNX, MEAN, 768, 8192),
    ("nomic-ai/nomic-embed-text-v1.5", DENSE, ONNX, MEAN, 768, 8192),
    ("Xenova/paraphrase-multilingual-MiniLM-L12-v2", DENSE, ONNX, MEAN, 384, 512),
    ("Xenova/paraphrase-multilingual-mpnet-base-v2", DENSE, ONNX, MEAN, 768, 512),
    ("BAAI/bge-m3", DENSE, f"{DATA} onnx/Constant_7_attr__value", CLS, 1024, 8192),
    ("lightonai/modernbert-embed-large", DENSE, ONNX, MEAN, 1024, 8192),
    ("intfloat/multilingual-e5-small", DENSE, ONNX, MEAN, 384, 512),
    ("intfloat/multilingual-e5-base", DENSE, ONNX, MEAN, 768, 512),
    ("Qdrant/multilingual-e5-large-onnx", DENSE, "model.onnx model.onnx_data", MEAN, 1024, 512),
    ("mixedbread-ai/mxbai-embed-large-v1", DENSE, ONNX, CLS, 1024, 512),
    ("Alibaba-NLP/gte-base-en-v1.5", DENSE, ONNX, CLS, 768, 8192),
    ("Alibaba-NLP/gte-large-en-v1.5", DENSE, ONNX, CLS, 1024, 8192),
    ("Qdrant/clip-ViT-B-32-text", DENSE, "model.onnx", NONE, 512, 77),
    ("jinaai/jina-embeddings-v2-base-code", DENSE, ONNX, MEAN, 768, 8192),
    ("jinaai/jina-embeddings-v2-base-en", DENSE, "model.onnx", MEAN, 768, 8192),
    ("snowflake/snowflake-arctic-embed-xs", DENSE, ONNX, CLS, 384, 512),
    ("snowflake/snowflake-arctic-embed-s", DENSE, ONNX, CLS, 384, 512),
    ("Snowflake/snowflake-arctic-embed-m", DENSE, ONNX, CLS, 768, 512),
    ("snowflake/snowflake-arctic-embed-m-long", DENSE, ONNX, CLS, 768, 2048),
    ("snowflake/snowflake-arctic-embed-l", DENSE, ONNX, CLS, 1024, 512),
    ("Qwen/Qwen3-Embedding-0.6B", DENSE, "model.safetensors", LAST, 1024, 32768),
    (
        *("Qwen/Qwen3-Embedding-4B", DENSE),
        f"{INDEX} model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
        *(LAST, 2560, 32768),
    ),
    (
        *("Qwen/Qwen3-Embedding-8B", DENSE),
        f"{INDEX} model-00001-of-00004.safetensors model-00002-of-00004.safetensors"
        " model-00003-of-00004.safetensors model-00004-of-00004.safetensors",
        *(LAST, 4096, 32768),
    ),
    ("BAAI/bge-reranker-base", CROSS, ONNX, NONE, 0, 512),
    ("rozgo/bge-reranker-v2-m3", CROSS, "model.onnx model.onnx.data", NONE, 0, 8192),
    ("jinaai/jina-reranker-v1-turbo-en", CROSS, ONNX, NONE, 0, 8192),
    ("jinaai/jina-reranker-v2-base-multilingual", CROSS, ONNX, NONE, 0, 1024),
]

# id, repository ("=": the id), kind, files, pooling, dimensions, normalised
THEIRS = [
    ("BAAI/bge-base-en", "Qdrant/fast-bge-base-en", DENSE, "model_optimized.onnx", CLS, 768, True),
    (
        *("BAAI/bge-base-en-v1.5", "Qdrant/bge-base-en-v1.5-onnx-Q"),
        *(DENSE, "model_optimized.onnx", CLS, 768, True),
    ),
    (
        *("BAAI/bge-large-en-v1.5", "Qdrant/bge-large-en-v1.5-onnx"),
        *(DENSE, "model.onnx", CLS, 1024, True),
    ),
    ("BAAI/bge-small-en", "Qdrant/bge-small-en", DENSE, "model_optimized.onnx", CLS, 384, True),
    (
        *("BAAI/bge-small-en-v1.5", "Qdrant/bge-small-en-v1.5-onnx-Q"),
        *(DENSE, "model_optimized.onnx", CLS, 384, True),
    ),
    (
        *("BAAI/bge-small-zh-v1.5", "Qdrant/bge-small-zh-v1.5"),
        *(DENSE, "model_optimized.onnx", CLS, 512, True),
    ),
    ("jinaai/jina-clip-v1", "=", DENSE, "onnx/text_model.onnx", CLS, 768, True),
    ("Qdrant/constella-zero", "=", DENSE, "model.onnx", CLS, 1024, True),
    ("Qdrant/stella-en-400M-v5-doc-onnx", "=", DENSE, "model.onnx", CLS, 1024, True),
    (
        *("google/siglip2-base-patch16-224", "onnx-community/siglip2-base-patch16-224-ONNX"),
        *(DENSE, "onnx/text_model.onnx", NONE, 768, True),
    ),
    (
        *("jinaai/jina-embeddings-v2-small-en", "Xenova/jina-embeddings-v2-small-en"),
        *(DENSE, ONNX, MEAN, 512, True),
    ),
    ("jinaai/jina-embeddings-v2-base-de", "=", DENSE, ONNX, MEAN, 768, True),
    ("jinaai/jina-embeddings-v2-base-zh", "=", DENSE, ONNX, MEAN, 768, True),
    ("jinaai/jina-embeddings-v2-base-es", "=", DENSE, ONNX, MEAN, 768, True),
    ("thenlper/gte-base", "=", DENSE, ONNX, MEAN, 768, True),
    ("thenlper/gte-large", "Qdrant/gte-large-onnx", DENSE, "model.onnx", MEAN, 1024, True),
    ("Qdrant/constella-nano", "=", DENSE, "model.onnx", MEAN, 1024, True),
    (
        *("nomic-ai/nomic-embed-text-v1.5-Q", "nomic-ai/nomic-embed-text-v1.5"),
        *(DENSE, "onnx/model_quantized.onnx", MEAN, 768, False),
    ),
    (
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "Qdrant/paraphrase-multilingual-MiniLM-L12-v2-onnx-Q",
        *(DENSE, "model_optimized.onnx", MEAN, 384, False),
    ),
    ("jinaai/jina-embeddings-v3", "=", DENSE, DATA, MEAN, 1024, True),
    (
        *("google/embeddinggemma-300m", "onnx-community/embeddinggemma-300m-ONNX"),
        *(DENSE, DATA, NONE, 768, False),
    ),
    (
        "ibm-granite/granite-embedding-small-english-r2",
        "onnx-community/granite-embedding-small-english-r2-ONNX",
        *(DENSE, DATA, NONE, 384, False),
    ),
    (
        *("Qwen/Qwen3-Embedding-0.6B-Q", "Qdrant/Qwen3-Embedding-0.6B-onnx"),
        *(DENSE, "onnx/model_quantized.onnx", LAST, 1024, True),
    ),
    ("minishlab/potion-base-8M", "=", STATIC, "model.safetensors", NONE, 256, True),
    ("minishlab/potion-retrieval-32M", "=", STATIC, "model.safetensors", NONE, 512, True),
    ("minishlab/potion-multilingual-128M", "=", STATIC, "model.safetensors", NONE, 256, True),
    (
        *("prithivida/Splade_PP_en_v1", "Qdrant/Splade_PP_en_v1"),
        *(SPARSE, "model.onnx", SPLADE, 30522, False),
    ),
    (
        "Qdrant/bm42-all-minilm-l6-v2-attentions",
        "Qdrant/all_miniLM_L6_v2_with_attentions",
        *(SPARSE, "model.onnx stopwords.txt", NONE, 30522, False),
    ),
    ("Qdrant/bm25", "=", SPARSE, f"config.json {STOPWORDS}", NONE, 0, False),
    (
        *("Qdrant/minicoil-v1", "=", SPARSE),
        f"{ONNX} stopwords.txt minicoil.triplet.model.npy minicoil.triplet.model.vocab",
        *(NONE, 19125, False),
    ),
    (
        "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-gte",
        "Qdrant/opensearch-neural-sparse-encoding-doc-v3-gte",
        *(SPARSE, "model.onnx idf.json", NONE, 30522, False),
    ),
    ("colbert-ir/colbertv2.0", "=", MULTI, "model.onnx", TOKENS, 128, True),
    ("answerdotai/answerai-colbert-small-v1", "=", MULTI, "vespa_colbert.onnx", TOKENS, 96, True),
    ("jinaai/jina-colbert-v2", "=", MULTI, DATA, TOKENS, 128, True),
    ("lightonai/LateOn", "=", MULTI, "model.onnx", TOKENS, 128, True),
    ("lightonai/mLateOn", "=", MULTI, "model.onnx", TOKENS, 128, True),
    (
        *("jinaai/jina-embeddings-v2-small-en-tokens", "Xenova/jina-embeddings-v2-small-en"),
        *(MULTI, ONNX, TOKENS, 512, False),
    ),
    ("Qdrant/colpali-v1.3-fp16", "=", MULTI, "model.onnx model.onnx_data", NONE, 128, False),
    ("Qdrant/colmodernvbert", "=", MULTI, "model_v2.onnx processor_config.json", NONE, 128, False),
    ("Qdrant/clip-ViT-B-32-vision", "=", IMAGE, "model.onnx", NONE, 512, True),
    ("Qdrant/resnet50-onnx", "=", IMAGE, "model.onnx", NONE, 2048, True),
    ("Qdrant/Unicom-ViT-B-16", "=", IMAGE, "model.onnx", NONE, 768, True),
    ("Qdrant/Unicom-ViT-B-32", "=", IMAGE, "model.onnx", NONE, 512, True),
    (
        *("jinaai/jina-clip-v1-vision", "jinaai/jina-clip-v1"),
        *(IMAGE, "onnx/vision_model.onnx", NONE, 768, True),
    ),
    ("nomic-ai/nomic-embed-vision-v1.5", "=", IMAGE, ONNX, CLS, 768, True),
    (
        *("nomic-ai/nomic-embed-vision-v1.5-Q", "nomic-ai/nomic-embed-vision-v1.5"),
        *(IMAGE, "onnx/model_quantized.onnx", CLS, 768, True),
    ),
    (
        *("google/siglip2-base-patch16-224-vision", "onnx-community/siglip2-base-patch16-224-ONNX"),
        *(IMAGE, "onnx/vision_model.onnx", NONE, 768, True),
    ),
    ("Xenova/ms-marco-MiniLM-L-6-v2", "=", CROSS, ONNX, NONE, 0, False),
    ("Xenova/ms-marco-MiniLM-L-12-v2", "=", CROSS, ONNX, NONE, 0, False),
    (
        *("BAAI/bge-reranker-v2-m3-int8", "onnx-community/bge-reranker-v2-m3-ONNX"),
        *(CROSS, "onnx/model_int8.onnx", NONE, 0, False),
    ),
    ("jinaai/jina-reranker-v1-tiny-en", "=", CROSS, ONNX, NONE, 0, False),
]

ALIASES = {
    "sentence-transformers/all-MiniLM-L6-v2": "Qdrant/all-MiniLM-L6-v2-onnx",
    "intfloat/multilingual-e5-large": "Qdrant/multilingual-e5-large-onnx",
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2": (
        "Xenova/paraphrase-multilingual-mpnet-base-v2"
    ),
    "Snowflake/snowflake-arctic-embed-xs": "snowflake/snowflake-arctic-embed-xs",
    "Snowflake/snowflake-arctic-embed-s": "snowflake/snowflake-arctic-embed-s",
    "snowflake/snowflake-arctic-embed-m": "Snowflake/snowflake-arctic-embed-m",
    "Snowflake/snowflake-arctic-embed-m-long": "snowflake/snowflake-arctic-embed-m-long",
    "Snowflake/snowflake-arctic-embed-l": "snowflake/snowflake-arctic-embed-l",
    "BAAI/bge-reranker-v2-m3": "rozgo/bge-reranker-v2-m3",
    "prithvida/Splade_PP_en_v1": "prithivida/Splade_PP_en_v1",
    "Qdrant/Splade_PP_en_v1": "prithivida/Splade_PP_en_v1",
}

NOT_MEANT_BY_STAR = {
    "BAAI/bge-base-en",
    "BAAI/bge-base-en-v1.5",
    "BAAI/bge-small-en",
    "BAAI/bge-small-en-v1.5",
    "BAAI/bge-small-zh-v1.5",
    "BAAI/bge-reranker-v2-m3-int8",
    "google/embeddinggemma-300m",
    "nomic-ai/nomic-embed-text-v1.5-Q",
    "nomic-ai/nomic-embed-vision-v1.5-Q",
    "Qwen/Qwen3-Embedding-0.6B-Q",
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
}

Row = tuple[str, Kind, str, list[str], str | None, Pooling, int, bool, int]


def row(spec: ModelSpec) -> Row:
    """What the tables say about a model."""
    assert spec.origin
    assert spec.origin.revision is None
    repo, files = spec.origin.repo, list(spec.origin.files)
    how = (spec.pooling, spec.dimensions, spec.normalize, spec.max_tokens)
    return (spec.id, spec.kind, repo, files, spec.file, *how)


def expected() -> list[Row]:
    """The tables, row by row; all dense models of ours are normalised."""
    rows: list[Row] = []
    for name, kind, files, pooling, dimensions, limit in OURS:
        first, *_ = names = files.split()
        graph = None if first.startswith("model.safetensors") else first
        rows.append((name, kind, name, names, graph, pooling, dimensions, kind is DENSE, limit))
    for name, repo, kind, files, pooling, dimensions, normalize in THEIRS:
        names = files.split()
        where, limit = name if repo == "=" else repo, 512 if kind is STATIC else 0
        rows.append((name, kind, where, names, names[0], pooling, dimensions, normalize, limit))
    return rows


def test_every_model_is_what_the_tables_say() -> None:
    """Kind, repository, files, pooling, dimensions, normalisation and limit of every id."""
    found = {spec.id: row(spec) for spec in published_models()}
    for wanted in expected():
        assert found.get(wanted[0]) == wanted
    assert found.keys() == {wanted[0] for wanted in expected()}


def test_every_id_of_fastembed_is_known() -> None:
    """What FastEmbed's public lists name is a model here, in the same file unless ours wins."""
    lists = (
        *(TextEmbedding, SparseTextEmbedding, LateInteractionTextEmbedding, ImageEmbedding),
        *(LateInteractionMultimodalEmbedding, TokenEmbeddingsModel, TextCrossEncoder),
    )
    files = {(spec.id, spec.file) for spec in published_models()}
    names = {name: spec.id for spec in published_models() for name in spec.names}
    ours = {row[0] for row in OURS}
    for model in chain.from_iterable(one.list_supported_models() for one in lists):
        name, file = names[model["model"]], model["model_file"]
        assert name in ours or {(name, file), (f"{name}-vision", file)} & files, name


def test_no_name_is_claimed_twice() -> None:
    """Every id and every alias means one model."""
    names = [name for spec in published_models() for name in spec.names]
    assert len(names) == len(set(names))
    assert len({spec.id for spec in fastembed_models()}) == len(fastembed_models())


def test_aliases() -> None:
    """Every alias leads to its model, and there are no others."""
    assert {alias: spec.id for spec in published_models() for alias in spec.aliases} == ALIASES


def test_star_leaves_out() -> None:
    """`*` means no quantised or pre-optimised files, no `-zh-` and no embeddinggemma."""
    assert {spec.id for spec in published_models() if not gpu_friendly(spec)} == NOT_MEANT_BY_STAR


def test_licence_and_size_come_along() -> None:
    """FastEmbed's words for a model of ours hold, its size only where it is the same file."""
    models = {spec.id: spec for spec in published_models()}
    same, other = models["Qdrant/all-MiniLM-L6-v2-onnx"], models["Qwen/Qwen3-Embedding-0.6B"]
    assert (same.license, same.size) == ("apache-2.0", 90_000_000)
    assert (other.license, other.size) == ("apache-2.0", 0)
    assert same.description.startswith("Text embeddings, Unimodal (text), English")


def test_a_class_nobody_knows_is_named() -> None:
    """A class of FastEmbed that is not in the table is an error, not a guess."""

    class NewEmbedding:
        @classmethod
        def _list_supported_models(cls) -> list[DenseModelDescription]:
            source = ModelSource(hf="a/b")
            return [DenseModelDescription("a/b", source, "model.onnx", "", "mit", 0.1, dim=4)]

    with pytest.raises(StartupError, match=r"NewEmbedding \(a/b\)"):
        list(translate(NewEmbedding))
