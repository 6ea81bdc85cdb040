"""The first layer behind the log: refuses at once what would be refused after all the work.

At ten times the load that a server can carry, nine requests of ten are refused: they must cost next
to nothing. So what admission would not take in is answered here, before routing and before the body
is read. Larger bodies pass: which lane they belong to is known only once they are read.
"""

from collections.abc import Collection, Mapping

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from embedding_server.api.errors import Shape, note, shape_for
from embedding_server.api.middleware import client_of, header
from embedding_server.errors import ServiceUnavailable
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.schedule import Lane

_SMALL_BYTES = 1024


class Guard:
    """Wraps the application.

    Args:
        app: the next ASGI application.
        queue: decides.
        routes: paths of inference routes.
        shapes: how failures are written, by path prefix.
    """

    def __init__(
        self,
        app: ASGIApp,
        queue: AdmissionQueue,
        routes: Collection[str],
        shapes: Mapping[str, Shape],
    ) -> None:
        self._app = app
        self._queue = queue
        self._routes = routes
        self._shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        scope["path_template"] = scope["path"]
        name, headers = note(scope, refusal)
        status, body = shape_for(self._shapes, scope["path"])(refusal, name)
        raw = [(key.lower().encode(), text.encode()) for key, text in headers.items()]
        raw.append((b"content-type", b"application/json"))
        content = msgspec.json.encode(body)
        raw.append((b"content-length", b"%d" % len(content)))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    def _refusal(self, scope: Scope) -> ServiceUnavailable | None:
        if (
            scope["type"] != ScopeType.HTTP
            or scope["method"] != "POST"
            or scope["path"] not in self._routes
            or not 0 < int(header(scope, b"content-length", "0")) <= _SMALL_BYTES
            or header(scope, b"origin")  # a browser needs the headers of CORS
        ):
            return None
        return self._queue.refused(Lane.INTERACTIVE, client_of(scope))
