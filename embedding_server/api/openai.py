"""OpenAI's API: embeddings, as its SDKs call them; the model lists are in `models`."""

import time
from typing import Any, ClassVar, Literal

import msgspec
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import INFERENCE, MODEL, answers
from embedding_server.api.encode import base64_row, json_items, json_object
from embedding_server.api.errors import Shape
from embedding_server.api.inference import (
    Inputs,
    Model,
    VectorOptions,
    checked_documents,
    checked_inputs,
    plain_options,
    respond,
)
from embedding_server.api.middleware import event
from embedding_server.api.parts import parts
from embedding_server.core import Task, Vector
from embedding_server.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    ServiceError,
    Unauthorized,
    UnsupportedModel,
)

_MAX_INPUTS = 2048
"""OpenAI's own limit."""


class EmbeddingsRequest(VectorOptions, kw_only=True, frozen=True):
    """One text or several, or token ids of one or several; `user` and the like are ignored."""

    examples: ClassVar = [
        {"model": MODEL, "input": "a cat"},
        {"model": MODEL, "input": ["a cat", "a dog"], "encoding_format": "base64"},
    ]

    input: Inputs


class Embedding(msgspec.Struct):
    """One vector; with `encoding_format: base64` a string of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(msgspec.Struct):
    """Real tokens, special ones included; both numbers are the same."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(msgspec.Struct):
    """One element of `data` per text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Failure(msgspec.Struct):
    """What went wrong; `param` names the field of the request that is to blame, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class FailureBody(msgspec.Struct):
    """The body of every failure."""

    error: Failure


_CODES: dict[type[ServiceError], str] = {
    UnsupportedModel: "model_not_found",
    Unauthorized: "invalid_api_key",
    NotFound: "unknown_url",
    MethodNotAllowed: "method_not_supported",
    RateLimited: "rate_limit_exceeded",
}
_TYPES = {429: "rate_limit_error"}


def openai_error(error: ServiceError, _: str) -> tuple[int, FailureBody]:
    """A failure in OpenAI's `Shape`; an unknown model is a 404 there."""
    unknown_model = isinstance(error, UnsupportedModel)
    status = 404 if unknown_model else error.status
    failure = Failure(
        message=error.text,
        type=_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        param="model" if unknown_model else None,
        code="service_unavailable" if status == 503 else _CODES.get(type(error)),
    )
    return status, FailureBody(failure)


async def embeddings(request: ApiRequest, data: JSONBody[EmbeddingsRequest]) -> ASGIResponse:
    """Embed one text or several."""
    texts = checked_inputs(request, data.input, _MAX_INPUTS)
    answer = await parts(request).engine.embed(data.model, texts, data.options(request))
    body = json_object(
        object="list",
        data=await json_items(
            answer.vectors, _base64_item if data.encoding_format == "base64" else _float_item
        ),
        model=data.model,
        usage={"prompt_tokens": answer.usage.tokens, "total_tokens": answer.usage.tokens},
    )
    return await respond(request, body, data.model, len(texts), answer.usage)


def _float_item(index: int, vector: Vector) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": vector}


def _base64_item(index: int, vector: Vector) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": base64_row(vector)}


class ScoreRequest(msgspec.Struct, kw_only=True, frozen=True):
    """One text and others to score it against, or as many of either, in pairs."""

    examples: ClassVar = [{"model": MODEL, "text_1": "a pet", "text_2": ["a cat", "a sofa"]}]

    model: Model
    text_1: str | list[str]
    text_2: str | list[str]

    def sides(self) -> tuple[list[str], list[str]]:
        """Both sides of the pairs, the first of them perhaps one for all; raises `BadRequest`."""
        ones = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        others = checked_documents([self.text_2] if isinstance(self.text_2, str) else self.text_2)
        if len(ones) != 1 and (not ones or len(ones) != len(others)):
            raise BadRequest("text_1 must be one text, or as many as text_2 has")
        return ones, others


class Score(msgspec.Struct):
    """That of a pair."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(msgspec.Struct, kw_only=True):
    """One element of `data` per pair, in order; `created` in unix seconds."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


@post(
    "/v1/score",
    status_code=200,
    opt={INFERENCE: Task.RERANK},
    responses=answers(ScoreAnswer),
)
async def score(request: ApiRequest, data: JSONBody[ScoreRequest]) -> ASGIResponse:
    """Score texts against each other, as vLLM does."""
    options = msgspec.structs.replace(plain_options(request), raw_scores=False)
    scores, usage = await parts(request).engine.score(data.model, *data.sides(), options)
    body = ScoreAnswer(
        id=event(request.scope)["request_id"],
        created=int(time.time()),
        model=data.model,
        data=[Score("score", index, found) for index, found in enumerate(scores)],
        usage=Usage(usage.tokens, usage.tokens),
    )
    content = msgspec.json.encode(body)
    return await respond(request, content, data.model, len(scores), usage)


def embeddings_at(*paths: str) -> Any:
    """The handler of these paths."""
    return post(
        list(paths),
        status_code=200,
        opt={INFERENCE: Task.EMBED},
        responses=answers(EmbeddingsAnswer),
    )(embeddings)


SHAPES: dict[str, Shape] = dict.fromkeys(
    ("/v1", "/v1/models", "/api/v1", "/api/v1/embeddings", "/embeddings", "/models"), openai_error
)
HANDLERS: list[Any] = [embeddings_at("/v1/embeddings", "/embeddings"), score]
