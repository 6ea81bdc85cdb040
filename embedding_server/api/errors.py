"""Errors -> answers: every failure, the framework's own included, in its dialect's shape.

The native shape, `{"error", "code", "request_id"}`, is here; other dialects bring theirs.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import Scope

from embedding_server.api.middleware import event
from embedding_server.errors import (
    BadRequest,
    DeadlineExceeded,
    EmbeddingError,
    InternalError,
    MethodNotAllowed,
    ModelLoadError,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    RequestTimeout,
    RerankError,
    ServiceError,
    ServiceUnavailable,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    UnsupportedModel,
)

log = structlog.get_logger()


Shape = Callable[[ServiceError, str], tuple[int, msgspec.Struct]]
"""How a dialect writes a failure: from it and the request id to a status and a body."""


class ErrorBody(msgspec.Struct):
    """The body of every failure."""

    error: str
    code: str
    request_id: str


def native_error(error: ServiceError, request_id: str) -> tuple[int, ErrorBody]:
    """The native `Shape`."""
    return error.status, ErrorBody(error=error.text, code=error.code, request_id=request_id)


_ALWAYS = (MethodNotAllowed(), InternalError())
_NAMED = (UnsupportedModel(),)
_ACTING = (
    BadRequest(),
    UnsupportedModel(),
    RequestTimeout(),
    PayloadTooLarge(),
    UnsupportedMediaType(),
    RateLimited("", retry_after=0.0),
    EmbeddingError(),
    RerankError(),
    ModelLoadError("", reason="", retry_after=0.0),
    ServiceUnavailable("", reason="", retry_after=0.0),
    DeadlineExceeded(),
)


def failures(
    shapes: Sequence[Shape], *, acts: bool, named: bool, keyed: bool
) -> dict[int, tuple[str, tuple[type[msgspec.Struct], ...]]]:
    """How a route may fail, in these shapes: words and the types of bodies, by status.

    It does something, its path names a model, and it wants a key, or not.
    """
    errors: list[ServiceError] = [*_ALWAYS, *(_ACTING if acts else _NAMED if named else ())]
    errors += [Unauthorized()] if keyed else []
    words: dict[int, dict[str, None]] = {}
    bodies: dict[int, dict[type[msgspec.Struct], None]] = {}
    for error, shape in itertools.product(errors, shapes):
        status, body = shape(error, "")
        words.setdefault(status, {})[error.prefix] = None
        bodies.setdefault(status, {})[type(body)] = None
    return {status: ("; ".join(words[status]), tuple(bodies[status])) for status in words}


SHAPE = "shape"
"""Key of a connection's state: the `Shape` of a dialect that its body chose."""


def shape_for(shapes: Mapping[str, Shape], scope: Scope) -> Shape:
    """How failures of this request are written.

    `shapes` has path prefixes without a slash at their end; the longest that fits is taken. `/` is
    the root itself.
    """
    chosen = scope["state"].get(SHAPE)
    return cast(Shape, chosen) if chosen else shape_of(shapes, scope["path"])


def shape_of(shapes: Mapping[str, Shape], path: str) -> Shape:
    """How failures below `path` are written."""
    fitting = [one for one in shapes if path == one or path.startswith(f"{one}/")]
    # The path of `OPTIONS *` has no slash.
    return shapes[max(fitting, key=len)] if fitting else native_error


def renderer(
    shapes: Mapping[str, Shape],
) -> Callable[[Request[Any, Any, Any], Exception], Response[msgspec.Struct]]:
    """The application's exception handler.

    It goes by the path because many failures come before any handler: 404, 405, a bad body.
    """

    def render(request: Request[Any, Any, Any], error: Exception) -> Response[msgspec.Struct]:
        known = error if isinstance(error, ServiceError) else _translate(request, error)
        name, headers = note(request.scope, known)
        status, body = shape_for(shapes, request.scope)(known, name)
        return Response(body, status_code=status, headers=headers)

    return render


def note(scope: Scope, error: ServiceError) -> tuple[str, dict[str, str]]:
    """Put a failure into the request's log event; its id, and the headers for its answer."""
    fields = event(scope)
    fields["code"] = error.code
    if isinstance(error, Unavailable):
        fields["reason"] = error.reason
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    if isinstance(error, RequestTimeout):
        headers["Connection"] = "close"  # the rest of the request may still come
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(round(error.retry_after * 1000))
    return fields["request_id"], headers


def _translate(request: Request[Any, Any, Any], error: Exception) -> ServiceError:
    """Litestar's own failures, and ours that nobody expected."""
    if isinstance(error, ValidationException):
        return BadRequest("the request needs a JSON object as its body")
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.scope["path"]
    if status == 404:
        return NotFound(f"there is no {path[:200]}; /swagger-ui lists the routes")
    if status == 405:
        allow = (getattr(error, "headers", None) or {}).get("allow", "")
        return MethodNotAllowed(f"{request.method} does not work on {path[:200]}", allow=allow)
    if status < 500 and isinstance(error, HTTPException):
        return BadRequest(error.detail)
    log.error("request.failed", exc_info=error, **event(request.scope))
    return InternalError("the server has logged the cause under this request id")
