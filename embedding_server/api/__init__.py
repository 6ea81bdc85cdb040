"""The HTTP face: one module per dialect, and one row per dialect here."""

from typing import Any

from embedding_server.api import docs, kinds, native, openai, ops
from embedding_server.api.errors import Shape, native_error
from embedding_server.api.middleware import INFERENCE

ROUTERS: dict[str, list[Any]] = {
    "native": native.HANDLERS + kinds.HANDLERS,
    "openai": openai.HANDLERS,
    "ops": ops.HANDLERS,
    "docs": docs.HANDLERS,
}

INFERENCE_ROUTES = frozenset(
    path
    for handlers in ROUTERS.values()
    for handler in handlers
    if INFERENCE in (handler.opt or {})
    for path in handler.paths
)
"""Paths of the routes that run a model."""

ERROR_SHAPES: dict[str, Shape] = {
    "": native_error,
    "/v1": openai.openai_error,
    "/api/v1": openai.openai_error,
    "/embeddings": openai.openai_error,
}
"""Path prefix, in whole segments -> how failures below it are written; the longest wins."""
