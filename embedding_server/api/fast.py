"""The fast embedding API; its `/embed` beside TEI's is in `shared`, its lists are in `models`."""

import time
from typing import Any, ClassVar

import msgspec
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import INFERENCE, MODEL, answers
from embedding_server.api.encode import json_object, json_vectors
from embedding_server.api.errors import Shape
from embedding_server.api.inference import Model, checked_count, plain_options, respond
from embedding_server.api.parts import parts
from embedding_server.core import Task
from embedding_server.errors import ServiceError


class Failure(msgspec.Struct):
    """The body of every failure; `extra` is empty."""

    status_code: int
    detail: str
    extra: dict[str, str]


def fast_error(error: ServiceError, _: str) -> tuple[int, Failure]:
    """A failure in this API's `Shape`."""
    return error.status, Failure(error.status, error.text, {})


class EmbedRequest(msgspec.Struct, kw_only=True, frozen=True):
    """One text."""

    examples: ClassVar = [{"model_name": MODEL, "text": "a cat"}]

    model_name: Model
    text: str


class BatchRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Several texts."""

    examples: ClassVar = [{"model_name": MODEL, "texts": ["a cat", "a dog"]}]

    model_name: Model
    texts: list[str]


class EmbedAnswer(msgspec.Struct):
    """The vector of one text; `text_length` in characters."""

    embedding: list[float]
    model_name: str
    dimension: int
    text_length: int
    processing_time_ms: float


class BatchAnswer(msgspec.Struct):
    """One vector per text, in order."""

    embeddings: list[list[float]]
    model_name: str
    dimension: int
    count: int
    processing_time_ms: float


async def embed(request: ApiRequest, model: str, text: str) -> ASGIResponse:
    """The answer with one text's vector."""
    started = time.perf_counter()
    answer = await parts(request).engine.embed(model, [text], plain_options(request))
    vectors = await json_vectors(answer.vectors)
    body = json_object(
        embedding=vectors[1:-1],
        model_name=model,
        dimension=answer.dimensions,
        text_length=len(text),
        processing_time_ms=_since(started),
    )
    return await respond(request, body, model, 1, answer.usage)


@post("/embed", status_code=200, opt={INFERENCE: Task.EMBED}, responses=answers(EmbedAnswer))
async def embed_alone(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """One vector."""
    return await embed(request, data.model_name, data.text)


@post(
    "/embed/batch",
    status_code=200,
    opt={INFERENCE: Task.EMBED},
    responses=answers(BatchAnswer),
)
async def embed_batch(request: ApiRequest, data: JSONBody[BatchRequest]) -> ASGIResponse:
    """One vector per text."""
    started, texts = time.perf_counter(), checked_count(request, data.texts)
    answer = await parts(request).engine.embed(data.model_name, texts, plain_options(request))
    body = json_object(
        embeddings=await json_vectors(answer.vectors),
        model_name=data.model_name,
        dimension=answer.dimensions,
        count=len(texts),
        processing_time_ms=_since(started),
    )
    return await respond(request, body, data.model_name, len(texts), answer.usage)


def _since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 3)


SHAPES: dict[str, Shape] = dict.fromkeys(("/embed", "/embed/batch", "/models"), fast_error)
HANDLERS: list[Any] = [embed_batch]
