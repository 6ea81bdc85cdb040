"""The dialect of OpenAI's API: embeddings and the model list, as its SDKs call them."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody, PathParameter
from litestar.response.base import ASGIResponse

from embedding_server.api.body import ApiRequest
from embedding_server.api.encode import base64_row, json_items, json_object
from embedding_server.api.errors import declared_errors
from embedding_server.api.inference import Dimensions, Model, deadline, respond
from embedding_server.api.middleware import INFERENCE, client_of
from embedding_server.api.parts import parts
from embedding_server.core import Task, Vector
from embedding_server.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unauthorized,
    UnsupportedModel,
)
from embedding_server.serving.engine import Options

_MAX_INPUTS = 2048
"""OpenAI's own limit."""
_SHOWN_CHARS = 200


class EmbeddingsRequest(msgspec.Struct, kw_only=True, frozen=True):
    """One text or several; `user` and whatever else a client sends is ignored."""

    model: Model
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None

    def texts(self) -> list[str]:
        """The texts to embed; raises `BadRequest` for token ids."""
        given = [self.input] if isinstance(self.input, str) else self.input
        texts = [one for one in given if isinstance(one, str)]
        if len(texts) < len(given):
            raise BadRequest("token ids are not supported yet as input: send text")
        return texts


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


class ModelCard(msgspec.Struct):
    """One name of an allowed model; `created` is when this server started, in unix seconds."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    dimensions: int
    task: Task


class ModelList(msgspec.Struct):
    """Every name of every allowed model, by name."""

    object: Literal["list"]
    data: list[ModelCard]


class Failure(msgspec.Struct):
    """What went wrong; `param` names the field of the request that is to blame, if one is."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class FailureBody(msgspec.Struct):
    """The body of every failure."""

    error: Failure


_UNKNOWN_MODEL = 404
_CODES: dict[type[ServiceError], str] = {
    UnsupportedModel: "model_not_found",
    Unauthorized: "invalid_api_key",
    NotFound: "unknown_url",
    MethodNotAllowed: "method_not_supported",
}


def openai_error(error: ServiceError, _: str) -> tuple[int, FailureBody]:
    """A failure in OpenAI's `Shape`; an unknown model is a 404 there."""
    unknown_model = isinstance(error, UnsupportedModel)
    status = _UNKNOWN_MODEL if unknown_model else error.status
    failure = Failure(
        message=error.text,
        type="server_error" if status >= 500 else "invalid_request_error",
        param="model" if unknown_model else None,
        code="service_unavailable" if status == 503 else _CODES.get(type(error)),
    )
    return status, FailureBody(failure)


_MODEL_ERROR = {
    _UNKNOWN_MODEL: ResponseSpec(FailureBody, generate_examples=False, description="unknown model")
}
_ERRORS = declared_errors(FailureBody) | _MODEL_ERROR


@post(
    ["/v1/embeddings", "/api/v1/embeddings", "/embeddings"],
    status_code=200,
    opt={INFERENCE: True},
    responses={200: ResponseSpec(EmbeddingsAnswer, generate_examples=False), **_ERRORS},
)
async def embeddings(request: ApiRequest, data: JSONBody[EmbeddingsRequest]) -> ASGIResponse:
    """Embed one text or several."""
    here, texts = parts(request), data.texts()
    limit = max(_MAX_INPUTS, here.settings.max_batch_size)
    if len(texts) > limit:
        raise BadRequest(f"Batch size {len(texts)} exceeds maximum {limit}")
    options = Options(
        dimensions=data.dimensions, timeout=deadline(request), client=client_of(request.scope)
    )
    answer = await here.engine.embed(data.model, texts, options)
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


@get(["/v1/models", "/api/v1/models"], sync_to_thread=False)
def models(request: ApiRequest) -> ModelList:
    """The allowed models, by name."""
    cards = _cards(request)
    return ModelList(object="list", data=[cards[name] for name in sorted(cards)])


@get("/v1/models/{id:path}", sync_to_thread=False, responses=_MODEL_ERROR)
def model(request: ApiRequest, name: Annotated[str, PathParameter(name="id")]) -> ModelCard:
    """One allowed model."""
    wanted = name.removeprefix("/")  # a path parameter begins with one
    card = _cards(request).get(wanted)
    if card is None:
        raise UnsupportedModel(f"Model {wanted[:_SHOWN_CHARS]} is not in the allowed models list")
    return card


def _cards(request: ApiRequest) -> dict[str, ModelCard]:
    """Every name that is allowed; one that is allowed for both tasks is an embedding model."""
    here = parts(request)
    listed, residents = here.engine.catalog.listed, here.engine.registry.residents
    return {
        name: ModelCard(
            id=name,
            object="model",
            created=here.created,
            owned_by=name.rpartition("/")[0] or "local",
            max_model_len=residents[spec.id].spec.max_tokens,
            dimensions=residents[spec.id].spec.dimensions,
            task=task,
        )
        for task in (Task.RERANK, Task.EMBED)
        for spec in listed[task].values()
        for name in spec.names
    }


HANDLERS: list[Any] = [embeddings, models, model]
