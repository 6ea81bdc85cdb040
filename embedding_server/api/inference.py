"""What the inference routes of all dialects share: common fields, the deadline, the answer."""

import re
from typing import Annotated

from litestar.response.base import ASGIResponse
from msgspec import Meta

from embedding_server.api.body import ApiRequest
from embedding_server.api.encode import compressed
from embedding_server.api.middleware import event, header
from embedding_server.api.parts import parts
from embedding_server.core import Usage
from embedding_server.errors import BadRequest

_MAX_TIMEOUT_MS = 3_600_000

Model = Annotated[str, Meta(description="an id or alias of the model lists")]
Dimensions = Annotated[int, Meta(ge=1, description="cut, then normalised")]
Timeout = Annotated[int, Meta(ge=1, le=_MAX_TIMEOUT_MS, description="milliseconds, then 504")]


def deadline(request: ApiRequest, milliseconds: int | None = None) -> float | None:
    """The client's own deadline in seconds: the field's, else the header's.

    Raises:
        BadRequest: the header is no number of milliseconds, or out of bounds.
    """
    text = header(request.scope, b"x-request-timeout-ms")
    if milliseconds is None and text:
        if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= _MAX_TIMEOUT_MS:
            raise BadRequest(f"X-Request-Timeout-Ms must be from 1 to {_MAX_TIMEOUT_MS}")
        milliseconds = int(text)
    return milliseconds / 1000 if milliseconds else None


async def respond(
    request: ApiRequest, body: bytes, model: str, texts: int, usage: Usage
) -> ASGIResponse:
    """The JSON `body` with the headers and log fields of `usage`, compressed if wanted."""
    fields = event(request.scope)
    fields.update(model=model, texts=texts, tokens=usage.tokens, truncated=usage.truncated)
    if usage.predicted:
        fields.update(
            queue_ms=round(1000 * usage.waited), predicted_queue_ms=round(1000 * usage.predicted)
        )
    headers = {"X-Model-Fingerprint": usage.fingerprint}
    if usage.truncated:
        headers["X-Truncated-Inputs"] = str(usage.truncated)
    if parts(request).settings.compress:
        body, more = await compressed(body, request.headers.get("accept-encoding", ""))
        headers |= more
    return ASGIResponse(body=body, media_type="application/json", headers=headers)
