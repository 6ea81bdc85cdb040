"""The models that are known by name: FastEmbed's, and further ids that deployments name.

Where both list an id, the row here is the one that holds.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

import msgspec

from embedding_server.catalog.fastembed import fastembed_models
from embedding_server.core import Kind, ModelSpec, Origin, Pooling
from embedding_server.settings import Names

_ONNX = "onnx/model.onnx"
_Said = TypeVar("_Said")


class _Row(NamedTuple):
    """One model; `file` None: from safetensors, which `extra` then names."""

    id: str
    file: str | None
    dimensions: int
    pooling: Pooling
    max_tokens: int
    kind: Kind = Kind.DENSE
    extra: Names = ()
    repo: str = ""  # the id


def _shards(count: int) -> Names:
    """The files of weights in so many parts, index first."""
    parts = [f"model-{part:05}-of-{count:05}.safetensors" for part in range(1, count + 1)]
    return ("model.safetensors.index.json", *parts)


_MEAN, _CLS, _LAST, _NONE = Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.NONE
_M3_DATA = ("onnx/model.onnx_data", "onnx/Constant_7_attr__value")
_E5_DATA, _RERANKER_DATA = ("model.onnx_data",), ("model.onnx.data",)
_SPLADE = "Qdrant/Splade_PP_en_v1"

_ROWS = (
    _Row("Qdrant/all-MiniLM-L6-v2-onnx", "model.onnx", 384, _MEAN, 512),
    _Row("Xenova/all-MiniLM-L12-v2", _ONNX, 384, _MEAN, 512),
    _Row("Xenova/all-mpnet-base-v2", _ONNX, 768, _MEAN, 512),
    _Row("Xenova/bge-small-en-v1.5", _ONNX, 384, _CLS, 512),
    _Row("Xenova/bge-base-en-v1.5", _ONNX, 768, _CLS, 512),
    _Row("Xenova/bge-large-en-v1.5", _ONNX, 1024, _CLS, 512),
    _Row("nomic-ai/nomic-embed-text-v1", _ONNX, 768, _MEAN, 8192),
    _Row("nomic-ai/nomic-embed-text-v1.5", _ONNX, 768, _MEAN, 8192),
    _Row("Xenova/paraphrase-multilingual-MiniLM-L12-v2", _ONNX, 384, _MEAN, 512),
    _Row("Xenova/paraphrase-multilingual-mpnet-base-v2", _ONNX, 768, _MEAN, 512),
    _Row("BAAI/bge-m3", _ONNX, 1024, _CLS, 8192, extra=_M3_DATA),
    _Row("lightonai/modernbert-embed-large", _ONNX, 1024, _MEAN, 8192),
    _Row("intfloat/multilingual-e5-small", _ONNX, 384, _MEAN, 512),
    _Row("intfloat/multilingual-e5-base", _ONNX, 768, _MEAN, 512),
    _Row("Qdrant/multilingual-e5-large-onnx", "model.onnx", 1024, _MEAN, 512, extra=_E5_DATA),
    _Row("mixedbread-ai/mxbai-embed-large-v1", _ONNX, 1024, _CLS, 512),
    _Row("Alibaba-NLP/gte-base-en-v1.5", _ONNX, 768, _CLS, 8192),
    _Row("Alibaba-NLP/gte-large-en-v1.5", _ONNX, 1024, _CLS, 8192),
    _Row("Qdrant/clip-ViT-B-32-text", "model.onnx", 512, _NONE, 77),
    _Row("jinaai/jina-embeddings-v2-base-code", _ONNX, 768, _MEAN, 8192),
    _Row("jinaai/jina-embeddings-v2-base-en", "model.onnx", 768, _MEAN, 8192),
    _Row("snowflake/snowflake-arctic-embed-xs", _ONNX, 384, _CLS, 512),
    _Row("snowflake/snowflake-arctic-embed-s", _ONNX, 384, _CLS, 512),
    _Row("Snowflake/snowflake-arctic-embed-m", _ONNX, 768, _CLS, 512),
    _Row("snowflake/snowflake-arctic-embed-m-long", _ONNX, 768, _CLS, 2048),
    _Row("snowflake/snowflake-arctic-embed-l", _ONNX, 1024, _CLS, 512),
    _Row("Qwen/Qwen3-Embedding-0.6B", None, 1024, _LAST, 32768, extra=("model.safetensors",)),
    _Row("Qwen/Qwen3-Embedding-4B", None, 2560, _LAST, 32768, extra=_shards(2)),
    _Row("Qwen/Qwen3-Embedding-8B", None, 4096, _LAST, 32768, extra=_shards(4)),
    _Row("BAAI/bge-reranker-base", _ONNX, 0, _NONE, 512, Kind.CROSS),
    _Row(
        "rozgo/bge-reranker-v2-m3", "model.onnx", 0, _NONE, 8192, Kind.CROSS, extra=_RERANKER_DATA
    ),
    _Row("jinaai/jina-reranker-v1-turbo-en", _ONNX, 0, _NONE, 8192, Kind.CROSS),
    _Row("jinaai/jina-reranker-v2-base-multilingual", _ONNX, 0, _NONE, 1024, Kind.CROSS),
    _Row(
        "prithivida/Splade_PP_en_v1",
        "model.onnx",
        30522,
        Pooling.SPLADE,
        0,
        Kind.SPARSE,
        repo=_SPLADE,
    ),
)

# An alias is another name of the same file: the repository that holds it, a name FastEmbed has for
# it, another spelling, which the hub redirects. Another export of the same weights is another
# model: FastEmbed's BAAI/bge-small-en-v1.5 is quantised, Xenova/bge-small-en-v1.5 is fp32. The one
# exception is bge-reranker-v2-m3: two fp32 exports of it are in use, and served is this one.
_ALIASES: Mapping[str, Names] = {
    "Qdrant/all-MiniLM-L6-v2-onnx": ("sentence-transformers/all-MiniLM-L6-v2",),
    "Qdrant/multilingual-e5-large-onnx": ("intfloat/multilingual-e5-large",),
    "Xenova/paraphrase-multilingual-mpnet-base-v2": (
        "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    ),
    "snowflake/snowflake-arctic-embed-xs": ("Snowflake/snowflake-arctic-embed-xs",),
    "snowflake/snowflake-arctic-embed-s": ("Snowflake/snowflake-arctic-embed-s",),
    "Snowflake/snowflake-arctic-embed-m": ("snowflake/snowflake-arctic-embed-m",),
    "snowflake/snowflake-arctic-embed-m-long": ("Snowflake/snowflake-arctic-embed-m-long",),
    "snowflake/snowflake-arctic-embed-l": ("Snowflake/snowflake-arctic-embed-l",),
    "rozgo/bge-reranker-v2-m3": ("BAAI/bge-reranker-v2-m3",),
    "prithivida/Splade_PP_en_v1": ("prithvida/Splade_PP_en_v1", "Qdrant/Splade_PP_en_v1"),
}

_QUESTION = "Represent this sentence for searching relevant passages: "
_NOMIC = {"query": "search_query: ", "document": "search_document: "}

_PROMPTS: Mapping[str, dict[str, str]] = {
    "*/multilingual-e5-*": {"query": "query: ", "document": "passage: "},
    "*/bge-*-en*": {"query": _QUESTION},
    "*/bge-*-zh-*": {"query": "为这个句子生成表示以用于检索相关文章\uff1a"},
    "nomic-ai/nomic-embed-text-*": _NOMIC,
    "lightonai/modernbert-embed-*": _NOMIC,
    "mixedbread-ai/mxbai-embed-*": {"query": _QUESTION},
    "*/snowflake-arctic-embed-*": {"query": _QUESTION},
    "Qwen/Qwen3-Embedding-*": {
        "query": "Instruct: Given a web search query, retrieve relevant passages that answer the"
        " query\nQuery:"
    },
    "google/embeddinggemma-*": {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
    },
}
"""Pattern of a family's ids -> input type -> what its model card puts before such a text."""

_SHORTEST: Mapping[str, int] = {
    "Qwen/Qwen3-Embedding-*": 32,
    "nomic-ai/nomic-embed-text-v1.5*": 64,
    "lightonai/modernbert-embed-large": 256,
    "google/embeddinggemma-*": 128,
    "jinaai/jina-embeddings-v3": 32,
    "jinaai/jina-colbert-v2": 64,
}
"""Pattern of a family's ids -> the fewest dimensions that its publisher names (Matryoshka, Kusupati
et al. 2022). Not here are those that name none, such as mxbai-embed-large-v1, and Stella, whose
widths are layers of their own and not cuts."""

_UNFRIENDLY = (
    "*-Q",
    "*-zh-*",
    "*embeddinggemma*",
    "*int8*",
    "*model_quantized.onnx",
    "*model_optimized.onnx",
)
"""Patterns of ids and files that a GPU gains nothing from."""


def published_models() -> list[ModelSpec]:
    """Every model that is known by name, each once; no name is claimed twice.

    Raises:
        StartupError: see `fastembed_models`.
    """
    listed = {spec.id: spec for spec in fastembed_models()}
    specs = [_described(_spec(row), listed) for row in _ROWS]
    claimed = {name for spec in specs for name in spec.names}
    specs += [spec for name, spec in listed.items() if name not in claimed]
    return [
        msgspec.structs.replace(
            spec,
            prompts=_of_family(_PROMPTS, spec.id, {}),
            min_dimensions=_of_family(_SHORTEST, spec.id, 1),
        )
        for spec in specs
    ]


def gpu_friendly(spec: ModelSpec) -> bool:
    """Whether `*` in an allow-list means this model too.

    It leaves out quantised and pre-optimised files, Chinese models and embeddinggemma.
    """
    texts = (spec.id, spec.file or "")
    return not any(fnmatchcase(text, pattern) for text in texts for pattern in _UNFRIENDLY)


def _spec(row: _Row) -> ModelSpec:
    return ModelSpec(
        id=row.id,
        aliases=_ALIASES.get(row.id, ()),
        kind=row.kind,
        origin=Origin(
            repo=row.repo or row.id, files=(row.file, *row.extra) if row.file else row.extra
        ),
        file=row.file,
        pooling=row.pooling,
        normalize=row.kind is Kind.DENSE,
        max_tokens=row.max_tokens,
        dimensions=row.dimensions,
    )


def _described(spec: ModelSpec, listed: Mapping[str, ModelSpec]) -> ModelSpec:
    """With what FastEmbed says about the model, and its size if that is the same file."""
    twin = next((listed[name] for name in spec.names if name in listed), None)
    if not twin:
        return spec
    return msgspec.structs.replace(
        spec,
        description=twin.description,
        license=twin.license,
        size=twin.size if twin.file == spec.file else 0,
    )


def _of_family(table: Mapping[str, _Said], name: str, default: _Said) -> _Said:
    """What the first pattern of the table that fits an id stands for."""
    return next((one for pattern, one in table.items() if fnmatchcase(name, pattern)), default)
