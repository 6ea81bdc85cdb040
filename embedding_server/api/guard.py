"""The first layer behind the log: lets in who may, and refuses at once what would be refused later.

At ten times the load that a server can carry, nine requests of ten are refused: they must cost next
to nothing. So what admission would not take in, whichever lane it belongs to, is answered here,
before its body is read. Of small bodies it is easy to see that they hold few texts: their lane
alone decides.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, ReceiveMessage, Scope, Send

from embedding_server.api.body import PART_SECONDS
from embedding_server.api.errors import Shape, note, shape_for
from embedding_server.api.keys import Keys
from embedding_server.api.limits import RateLimits
from embedding_server.api.middleware import CALLER, REFUSAL, client_of, header
from embedding_server.errors import RateLimited, ServiceError
from embedding_server.observability.stages import CURRENT
from embedding_server.serving.admission import AdmissionQueue
from embedding_server.serving.schedule import Lane

_SMALL_BYTES, _FEW_QUOTES = 1024, 14
"""JSON with so few quotation marks holds at most four texts beside two names and a model."""


class Guard:
    """Wraps the application.

    Args:
        app: the next ASGI application.
        queue: decides.
        routes: paths of inference routes.
        shapes: how failures are written, by path prefix.
        keys: who may come in.
        limits: how often, everything that is POSTed counted, and loading a model.
    """

    def __init__(
        self,
        app: ASGIApp,
        queue: AdmissionQueue,
        routes: Collection[str],
        shapes: Mapping[str, Shape],
        *,
        keys: Keys,
        limits: RateLimits,
    ) -> None:
        self._app = app
        self._queue = queue
        self._routes = routes
        self._shapes = shapes
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        try:
            if REFUSAL in state:
                raise state[REFUSAL]
            state[CALLER] = self._keys.caller(scope)
        except ServiceError as refusal:
            await self._refuse(scope, send, refusal)
            return
        if self._limits and (scope.get("method") == "POST" or scope["path"].endswith("/load")):
            await self._limited(scope, receive, send)
        else:
            await self._admitted(scope, receive, send)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on within the client's limits, and tell it of them."""
        client, charged = client_of(scope), 0

        def charge() -> None:
            nonlocal charged
            charged, before = _tokens_run(), charged
            self._limits.charge(client, charged - before)

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                charge()
                message["headers"] = [*message["headers"], *self._limits.headers(client)]
            await send(message)

        try:
            self._limits.spend(client)
        except RateLimited as refusal:
            await self._refuse(scope, forward, refusal)
        else:
            try:
                await self._admitted(scope, receive, forward)
            finally:
                charge()  # whoever leaves before its answer has had the work all the same

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on unless admission would not take it in."""
        lanes: Sequence[Lane] = ()
        if self._concerned(scope):
            lanes = list(Lane)
            if self._small(scope):
                try:
                    async with asyncio.timeout(PART_SECONDS):
                        message = await receive()
                except TimeoutError:
                    message = {"type": "http.disconnect"}
                if _few_texts(message):
                    lanes = [Lane.INTERACTIVE]
                receive = _after(message, receive)
        overload = self._queue.refused(lanes, client_of(scope)) if lanes else None
        if overload:
            await self._refuse(scope, send, overload)
        else:
            await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, send: Send, refusal: ServiceError) -> None:
        if scope["path"] in self._routes:
            scope["path_template"] = scope["path"]
        name, headers = note(scope, refusal)
        status, body = shape_for(self._shapes, scope)(refusal, name)
        raw = [(key.lower().encode(), text.encode()) for key, text in headers.items()]
        raw.append((b"content-type", b"application/json"))
        content = msgspec.json.encode(body)
        raw.append((b"content-length", b"%d" % len(content)))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    def _concerned(self, scope: Scope) -> bool:
        """Whether this asks for a model while others wait, or while the server drains."""
        return (
            (self._queue.depth > 0 or self._queue.draining)
            and scope.get("method") == "POST"
            and scope["path"] in self._routes
        )

    @staticmethod
    def _small(scope: Scope) -> bool:
        plain = not header(scope, b"content-encoding")
        return plain and 0 < int(header(scope, b"content-length", "0")) <= _SMALL_BYTES


def _tokens_run() -> int:
    """Tokens that went to be run for the request so far, whatever became of them."""
    trace = CURRENT.get()
    return sum(call.tokens for call in trace.calls) if trace else 0


def _few_texts(message: ReceiveMessage) -> bool:
    """Whether this is a whole body that holds four texts at most."""
    if message["type"] != "http.request" or message["more_body"]:
        return False
    return message["body"].count(b'"') <= _FEW_QUOTES


def _after(first: ReceiveMessage, receive: Receive) -> Receive:
    """`receive` that gives `first` once more."""
    seen = [first]

    async def replay() -> ReceiveMessage:
        return seen.pop() if seen else await receive()

    return replay
