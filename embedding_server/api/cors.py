"""What pages of other origins may do: everything, where the settings name their origin.

It stands before the guard, so that pages can read refusals too. Credentials (cookies, passwords and
certificates that the browser adds by itself) are never allowed; keys in headers are no such.
"""

import re
from collections.abc import Collection

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from embedding_server.api.middleware import header
from embedding_server.settings import Names

_METHODS, _SECONDS = b"GET, HEAD, POST, OPTIONS", b"600"
_HEADER_NAMES = re.compile(r"[\w-]+(?:\s*,\s*[\w-]+)*", re.ASCII)
_VARY = (b"vary", b"origin")


class Cors:
    """Wraps the application.

    Args:
        app: the next ASGI application.
        origins: those that are allowed; `*` stands for anything within one.
        shown: headers of answers that pages may read.
    """

    def __init__(self, app: ASGIApp, origins: Names, shown: Collection[str]) -> None:
        self._app = app
        self._any = "*" in origins
        patterns = (re.escape(one).replace(r"\*", "[^/]*") for one in origins)
        self._origins = re.compile("|".join(patterns) or r"(?!)")
        self._shown = (b"access-control-expose-headers", ", ".join(shown).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        origin = header(scope, b"origin") if scope["type"] == ScopeType.HTTP else ""
        if not origin:
            await self._app(scope, receive, send)
        elif scope.get("method") == "OPTIONS" and header(scope, b"access-control-request-method"):
            headers = self._preflight(origin, header(scope, b"access-control-request-headers"))
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            added = [*self._allowed(origin), self._shown]

            async def forward(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], *added]
                await send(message)

            await self._app(scope, receive, forward)

    def _allowed(self, origin: str) -> list[tuple[bytes, bytes]]:
        """Headers that let an origin read the answer, if it may."""
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        if not self._origins.fullmatch(origin):
            return [_VARY]
        return [(b"access-control-allow-origin", origin.encode("latin-1")), _VARY]

    def _preflight(self, origin: str, wanted: str) -> list[tuple[bytes, bytes]]:
        """Headers of the answer to a browser that asks whether it may ask."""
        headers = self._allowed(origin)
        if headers == [_VARY]:
            return headers
        headers += [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _SECONDS),
        ]
        if _HEADER_NAMES.fullmatch(wanted):  # `*` would leave out Authorization
            headers.append((b"access-control-allow-headers", wanted.encode("latin-1")))
        return headers
