"""What could be served: names -> specs -> files."""

from embedding_server.catalog.catalog import Catalog
from embedding_server.catalog.config import Type
from embedding_server.catalog.description import ModelFilesError
from embedding_server.catalog.local import FilesError
from embedding_server.catalog.opening import Locator, identified, open_catalog, open_hub

__all__ = [
    "Catalog",
    "FilesError",
    "Locator",
    "ModelFilesError",
    "Type",
    "identified",
    "open_catalog",
    "open_hub",
]
