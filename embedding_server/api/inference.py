"""What the inference routes of all dialects share: common fields, the deadline, the answer."""

import re
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, TypeVar, cast

import msgspec
from litestar.response.base import ASGIResponse
from msgspec import Meta

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import at_most_one
from embedding_server.api.encode import (
    base64_row,
    compressed,
    json_items,
    json_object,
    json_vectors,
)
from embedding_server.api.middleware import client_of, event
from embedding_server.api.parts import parts
from embedding_server.core import Embeddings, Side, Tokens, Usage, Vector
from embedding_server.errors import BadRequest
from embedding_server.observability.stages import CURRENT
from embedding_server.serving.options import Options

MAX_TIMEOUT_MS = 3_600_000
_MAX_DOCUMENTS = 1000

TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]
"""Of a vocabulary: the engine refuses numbers that are not in it."""

_IDS = {"type": "array", "items": {"type": "integer"}}
NO_MIX = {
    "anyOf": [{"type": "string"}, _IDS, {"items": {"type": ["string", "array"]}}],
}
"""The rule that token ids of one text and whole texts do not mix."""
Inputs = Annotated[
    str | list[str | TokenId | list[TokenId]], Meta(extra_json_schema={"allOf": [NO_MIX]})
]
"""A text, several, token ids of one, or of several."""
Given = str | Sequence[str | int | list[int]]
"""The same, as handlers pass it on."""

UNSUPPORTED = {"type": "null", "description": "not supported"}
"""The schema of a field that is refused with a better reason than its type."""

Model = Annotated[str, Meta(description="an id or alias of the model lists")]

Top = Annotated[int, Meta(extra_json_schema={"minimum": 1})]
"""How many documents are wanted; the engine refuses less than one."""

Dimensions = Annotated[int, Meta(ge=1, description="cut, then normalised")]
Timeout = Annotated[int, Meta(ge=1, le=MAX_TIMEOUT_MS, description="milliseconds, then 504")]

Sized = TypeVar("Sized", bound=Sequence[object])


class EmbedOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What the native routes take beside the texts, whatever the vectors are."""

    rule: ClassVar = at_most_one("prompt", "prompt_name")

    model: Model
    truncate: bool = True
    truncation_direction: Side = "right"
    input_type: Literal["query", "document"] | None = None
    prompt: Annotated[str, Meta(description="put before every text")] | None = None
    prompt_name: Annotated[str, Meta(description="one of the model's prompts")] | None = None
    timeout_ms: Timeout | None = None

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        return Options(
            truncate=self.truncate,
            side=self.truncation_direction,
            input_type=self.input_type,
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            timeout=deadline(request, self.timeout_ms),
            client=client_of(request.scope),
        )


class VectorOptions(EmbedOptions, kw_only=True, frozen=True):
    """The same for dense vectors."""

    dimensions: Dimensions | None = None
    normalize: bool = True
    encoding_format: Literal["float", "base64"] | None = None

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        return msgspec.structs.replace(
            super().options(request), dimensions=self.dimensions, normalize=self.normalize
        )


def either(text: str | None, inputs: Inputs | None) -> Given:
    """What was given as `text` or as `input`; raises `BadRequest`."""
    given = inputs if text is None else text
    if given is None or (text is not None and inputs is not None):
        raise BadRequest("give either text or input")
    return given


def checked_count(request: ApiRequest, inputs: Sized, public: int = 0) -> Sized:
    """The inputs of an embed request; raises `BadRequest` where they are too many.

    `public` is the limit of the dialect's own API, where it has one: the larger one counts.
    """
    limit = max(public, parts(request).settings.max_batch_size)
    if len(inputs) > limit:
        raise BadRequest(f"Batch size {len(inputs)} exceeds maximum {limit}")
    return inputs


def checked_documents(documents: Sized) -> Sized:
    """The documents of a rerank request; raises `BadRequest` where they are too many."""
    if len(documents) > _MAX_DOCUMENTS:
        raise BadRequest(f"{len(documents)} documents exceed the maximum of {_MAX_DOCUMENTS}")
    return documents


def checked_inputs(request: ApiRequest, given: Given, public: int = 0) -> list[str | Tokens]:
    """The texts of an input; raises `BadRequest` where they are too many, or mixed with token ids.

    `public` is as in `checked_count`.
    """
    if isinstance(given, str):
        return [given]
    if not given or not isinstance(given[0], int):
        checked_count(request, given, public)
    ids = [one for one in given if isinstance(one, int)]
    if not ids:
        return [one if isinstance(one, str) else Tokens(cast(list[int], one)) for one in given]
    if len(ids) < len(given):
        raise BadRequest("the input mixes token ids with texts: send a list of either")
    return [Tokens(ids)]


def plain_options(request: ApiRequest) -> Options:
    """What every request says: its client and the deadline of its header."""
    return Options(timeout=deadline(request), client=client_of(request.scope))


def deadline(request: ApiRequest, milliseconds: int | None = None) -> float | None:
    """The client's own deadline in seconds: the field's, else the header's.

    Raises:
        BadRequest: the header is no number of milliseconds, or out of bounds.
    """
    text = request.headers.get("x-request-timeout-ms")
    if text is not None:
        if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= MAX_TIMEOUT_MS:
            raise BadRequest(f"X-Request-Timeout-Ms must be from 1 to {MAX_TIMEOUT_MS}")
        milliseconds = milliseconds or int(text)
    return milliseconds / 1000 if milliseconds else None


async def respond_with_vectors(
    request: ApiRequest, data: VectorOptions, answer: Embeddings
) -> ASGIResponse:
    """The native answer with dense vectors, one per input or one per token of each."""
    encoded = (
        await json_items(answer.vectors, _base64_item)
        if data.encoding_format == "base64"
        else await json_vectors(answer.vectors)
    )
    count = len(answer.vectors)
    body = json_object(
        embeddings=encoded, model=data.model, count=count, dimensions=answer.dimensions
    )
    return await respond(request, body, data.model, count, answer.usage)


def _base64_item(_: int, vector: Vector) -> str | list[str]:
    return base64_row(vector) if vector.ndim == 1 else [base64_row(row) for row in vector]


async def respond(
    request: ApiRequest,
    body: bytes,
    model: str,
    texts: int,
    usage: Usage,
    *,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> ASGIResponse:
    """The JSON `body` with `headers` and those and log fields of `usage`, compressed if wanted."""
    fields = event(request.scope)
    fields.update(
        model=model,
        texts=texts,
        tokens=usage.tokens,
        truncated=usage.truncated,
        queue_ms=round(1000 * usage.waited),
        run_ms=round(1000 * usage.running),
    )
    if usage.predicted:
        fields["predicted_queue_ms"] = round(1000 * usage.predicted)
    said = {"X-Model-Fingerprint": usage.fingerprint, **headers}
    if usage.truncated:
        said["X-Truncated-Inputs"] = str(usage.truncated)
    if parts(request).settings.compress:
        body, more = await compressed(body, request.headers.get("accept-encoding", ""))
        said |= more
    if trace := CURRENT.get():
        trace.encoded = time.perf_counter()
    return ASGIResponse(body=body, media_type="application/json", headers=said)
