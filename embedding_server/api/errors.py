"""Errors -> answers: every failure, the framework's own included, in its dialect's shape.

The native shape, `{"error", "code", "request_id"}`, is here; other dialects bring theirs.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Union, cast

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
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


_DECLARED = (
    BadRequest(),
    UnsupportedModel(),
    Unauthorized(),
    MethodNotAllowed(),
    PayloadTooLarge(),
    UnsupportedMediaType(),
    RateLimited("", retry_after=0.0),
    InternalError(),
    EmbeddingError(),
    ModelLoadError("", reason="", retry_after=0.0),
    ServiceUnavailable("", reason="", retry_after=0.0),
    DeadlineExceeded(),
)


def answers(body: Any, *shapes: Shape) -> dict[int, ResponseSpec]:
    """What an inference route answers with 200 and, in these shapes, otherwise: for OpenAPI."""
    bodies: dict[int, dict[Any, None]] = {200: {body: None}}
    words: dict[int, dict[str, None]] = {200: {"done": None}}
    for error, shape in itertools.product(_DECLARED, shapes):
        status, failure = shape(error, "")
        bodies.setdefault(status, {})[type(failure)] = None
        words.setdefault(status, {})[error.prefix] = None
    unions: dict[int, Any] = {
        status: Union[tuple(one)]  # noqa: UP007 - of any number
        for status, one in bodies.items()
    }
    return {
        status: ResponseSpec(union, generate_examples=False, description="; ".join(words[status]))
        for status, union in unions.items()
    }


SHAPE = "shape"
"""Key of a connection's state: the `Shape` of a dialect that its body chose."""


def shape_for(shapes: Mapping[str, Shape], scope: Scope) -> Shape:
    """How failures of this request are written.

    `shapes` has path prefixes without a slash at their end; the longest that fits is taken. `/` is
    the root itself, and paths that begin with two slashes.
    """
    if chosen := scope["state"].get(SHAPE):
        return cast(Shape, chosen)
    path = scope["path"]
    fitting = [prefix for prefix in shapes if f"{path}/".startswith(f"{prefix}/")]
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
        headers |= getattr(error, "headers", None) or {}
        return Response(body, status_code=status, headers=headers)

    return render


def note(scope: Scope, error: ServiceError) -> tuple[str, dict[str, str]]:
    """Put a failure into the request's log event; its id, and the headers for its answer."""
    fields = event(scope)
    fields["code"] = error.code
    if isinstance(error, Unavailable):
        fields["reason"] = error.reason
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
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
        return MethodNotAllowed(f"{request.method} does not work on {path[:200]}")
    if status < 500 and isinstance(error, HTTPException):
        return BadRequest(error.detail)
    log.error("request.failed", exc_info=error, **event(request.scope))
    return InternalError("the server has logged the cause under this request id")
