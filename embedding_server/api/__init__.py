"""The HTTP face: one module per dialect, and one row per dialect here."""

from typing import Any

from embedding_server.api import docs, native, openai, ops
from embedding_server.api.errors import Shape, native_error

ROUTERS: dict[str, list[Any]] = {
    "native": native.HANDLERS,
    "openai": openai.HANDLERS,
    "ops": ops.HANDLERS,
    "docs": docs.HANDLERS,
}

ERROR_SHAPES: dict[str, Shape] = {
    "": native_error,
    "/v1": openai.openai_error,
    "/api/v1": openai.openai_error,
    "/embeddings": openai.openai_error,
}
"""Path prefix, in whole segments -> how failures below it are written; the longest wins."""
