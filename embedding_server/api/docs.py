"""Swagger UI, which works without internet: its files come from a package; and its document.

The document takes about 20 ms to make, beside the event loop.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from litestar import MediaType, Response, Router, get
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.static_files import create_static_files_router

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import JsonSchema
from embedding_server.api.description import document
from embedding_server.api.parts import parts
from embedding_server.api.security import page_policy

_ASSETS = "/swagger-ui/assets"
_PAGE = SwaggerRenderPlugin(
    js_url=f"{_ASSETS}/swagger-ui-bundle.js",
    css_url=f"{_ASSETS}/swagger-ui.css",
    standalone_preset_js_url=f"{_ASSETS}/swagger-ui-standalone-preset.js",
    favicon=f'<link rel="icon" href="{_ASSETS}/favicon-32x32.png">',
)


def assets() -> Router:
    """Swagger UI's files, out of the package `swagger-ui-py`."""
    directory = Path(str(resources.files("swagger_ui") / "static"))
    return create_static_files_router(_ASSETS, [directory])


@get("/swagger-ui", include_in_schema=False, media_type=MediaType.HTML, sync_to_thread=True)
def page(request: ApiRequest) -> Response[bytes]:
    """A page that shows the document and tries requests out."""
    made = _PAGE.render(request, _document(request))
    return Response(made, headers={"Content-Security-Policy": page_policy(made)})


@get("/api/openapi.json", include_in_schema=False, sync_to_thread=True)
def openapi(request: ApiRequest) -> JsonSchema:
    """The OpenAPI 3.1 document."""
    return _document(request)


def _document(request: ApiRequest) -> JsonSchema:
    return document(request.app, request.app.state["shapes"], parts(request))


HANDLERS: list[Any] = [page, openapi, assets()]
