"""Cohere's API, versions 1 and 2, and with it the rerank route of Jina and vLLM."""

from typing import Any

from embedding_server.api.cohere.answers import cohere_error
from embedding_server.api.cohere.embed import embed_v1, embed_v2
from embedding_server.api.cohere.rerank import rerank_v1, rerank_v2
from embedding_server.api.cohere.tokens import detokenize, tokenize
from embedding_server.api.errors import Shape

SHAPES: dict[str, Shape] = dict.fromkeys(
    ("/v1/embed", "/v1/rerank", "/v1/tokenize", "/v1/detokenize", "/v1/models", "/v2"),
    cohere_error,
)
HANDLERS: list[Any] = [embed_v1, embed_v2, rerank_v1, rerank_v2, tokenize, detokenize]
