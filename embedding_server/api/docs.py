"""The OpenAPI document and Swagger UI, which works without internet: its files come from a package.

Litestar renders the page at `/swagger-ui`; `/api/openapi.json` is the document itself.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from litestar import Response, Router, get
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.static_files import create_static_files_router

from embedding_server import __version__
from embedding_server.api.body import ApiRequest

_PAGE = "/swagger-ui"
_ASSETS = "/swagger-ui/assets"


def openapi_config() -> OpenAPIConfig:
    """Where Litestar puts the page, with local addresses for everything it loads."""
    return OpenAPIConfig(
        title="embedding-server",
        version=__version__,
        description="Embeddings and reranking over HTTP.",
        path=_PAGE,
        render_plugins=[
            SwaggerRenderPlugin(
                path="/",
                js_url=f"{_ASSETS}/swagger-ui-bundle.js",
                css_url=f"{_ASSETS}/swagger-ui.css",
                standalone_preset_js_url=f"{_ASSETS}/swagger-ui-standalone-preset.js",
                favicon=f'<link rel="icon" href="{_ASSETS}/favicon-32x32.png">',
            )
        ],
    )


def assets() -> Router:
    """Swagger UI's files, out of the package `swagger-ui-py`."""
    directory = Path(str(resources.files("swagger_ui") / "static"))
    return create_static_files_router(_ASSETS, [directory])


@get("/api/openapi.json", include_in_schema=False, sync_to_thread=False)
def openapi(request: ApiRequest) -> Response[dict[str, Any]]:
    """The OpenAPI 3.1 document."""
    return Response(request.app.openapi_schema.to_schema())


HANDLERS: list[Any] = [openapi, assets()]
