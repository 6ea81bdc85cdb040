"""The HTTP face: one module per dialect, and one row per dialect here."""

from typing import Any

from embedding_server.api import docs, native, ops

ROUTERS: dict[str, list[Any]] = {
    "native": native.HANDLERS,
    "ops": ops.HANDLERS,
    "docs": docs.HANDLERS,
}
