"""Errors -> answers of the native API: `{"error", "code", "request_id"}` for every failure."""

from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec

from embedding_server.api.middleware import event
from embedding_server.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServiceError,
    ServiceUnavailable,
    Unavailable,
    UnsupportedMediaType,
)

log = structlog.get_logger()


class ErrorBody(msgspec.Struct):
    """The body of every failure."""

    error: str
    code: str
    request_id: str


_DECLARED = (
    BadRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    UnsupportedMediaType,
    InternalError,
    ServiceUnavailable,
    DeadlineExceeded,
)
ERRORS = {
    error.status: ResponseSpec(ErrorBody, generate_examples=False, description=error.prefix)
    for error in _DECLARED
}
"""What an inference route may answer beside 200, for its OpenAPI document."""


def render(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """The answer for an exception of any kind."""
    known = error if isinstance(error, ServiceError) else _translate(request, error)
    headers = dict(getattr(error, "headers", None) or {})
    if known.retry_after is not None:
        headers["Retry-After"] = str(round(known.retry_after))
        headers["retry-after-ms"] = str(round(known.retry_after * 1000))
    body = ErrorBody(
        error=known.text, code=known.code, request_id=event(request.scope)["request_id"]
    )
    fields = event(request.scope)
    fields["code"] = known.code
    if isinstance(known, Unavailable):
        fields["reason"] = known.reason
    return Response(body, status_code=known.status, headers=headers)


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
