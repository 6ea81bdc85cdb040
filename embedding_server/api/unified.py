"""The unified embedding API below `/api/v1`; its model routes are in `models`."""

from typing import Any, ClassVar, Literal

import msgspec
from litestar import get, post
from litestar.params import JSONBody
from litestar.response import Redirect
from litestar.response.base import ASGIResponse

from embedding_server import __version__
from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import INFERENCE, KINDS, MODEL, answers
from embedding_server.api.encode import Weight, json_vectors
from embedding_server.api.errors import Shape
from embedding_server.api.inference import (
    Inputs,
    Model,
    Top,
    checked_documents,
    checked_inputs,
    plain_options,
    respond,
)
from embedding_server.api.parts import parts
from embedding_server.core import Kind, Task
from embedding_server.errors import ServiceError, UnsupportedModel
from embedding_server.serving.options import ONE_VECTOR, Options


class Failure(msgspec.Struct):
    """The body of every failure."""

    detail: str


def unified_error(error: ServiceError, _: str) -> tuple[int, Failure]:
    """A failure in this API's `Shape`; an unknown model is a 404 there."""
    status = 404 if isinstance(error, UnsupportedModel) else error.status
    return status, Failure(error.text)


class RequestOptions(msgspec.Struct, kw_only=True, frozen=True):
    """`batch_size` is the client's guess and has no effect: batches are made of all requests.

    `normalize_embeddings` null is true.
    """

    normalize_embeddings: bool | None = True
    batch_size: int | None = None
    prompt: str | None = None
    precision: Literal["float32"] | None = None


class EmbedRequest(msgspec.Struct, kw_only=True, frozen=True):
    """One text or several."""

    examples: ClassVar = [{"model": MODEL, "input": ["a cat", "a dog"]}]

    model: Model
    input: Inputs
    options: RequestOptions | None = None

    def engine_options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        said = self.options or RequestOptions()
        return msgspec.structs.replace(
            plain_options(request),
            normalize=said.normalize_embeddings is not False,
            prompt=said.prompt,
        )


class RerankRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A query and documents to order by relevance to it."""

    examples: ClassVar = [
        {"model": MODEL, "query": "a pet", "documents": ["a cat", "a sofa"], "top_k": 1}
    ]

    model: Model
    query: str
    documents: list[str]
    top_k: Top | None = None


class Ranked(msgspec.Struct):
    """A document: `index` is its place in the request."""

    text: str
    score: float
    index: int


class RerankAnswer(msgspec.Struct):
    """Best first, ties in request order."""

    results: list[Ranked]
    model: str


class Root(msgspec.Struct):
    """What this is."""

    message: str
    version: str
    docs_url: str


@post(
    "/api/v1/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED},
    responses=answers(list[list[float]]),
)
async def embed(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """One vector per text."""
    return await _embed(request, data, ONE_VECTOR)


@post(
    "/api/v1/embed_sparse",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (Kind.SPARSE,)},
    responses=answers(list[list[Weight]]),
)
async def embed_sparse(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """Weights of words per text."""
    return await _embed(request, data, (Kind.SPARSE,))


async def _embed(request: ApiRequest, data: EmbedRequest, kinds: tuple[Kind, ...]) -> ASGIResponse:
    texts = checked_inputs(request, data.input)
    engine = parts(request).engine
    answer = await engine.embed(data.model, texts, data.engine_options(request), kinds)
    body = await json_vectors(answer.vectors)
    return await respond(request, body, data.model, len(texts), answer.usage)


@post(
    "/api/v1/rerank",
    status_code=200,
    opt={INFERENCE: Task.RERANK},
    responses=answers(RerankAnswer),
)
async def rerank(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order documents by relevance to a query."""
    texts = checked_documents(data.documents)
    answer = await parts(request).engine.rerank(
        data.model, data.query, texts, data.top_k, plain_options(request)
    )
    pairs = zip(answer.order, answer.scores, strict=True)
    results = [Ranked(texts[index], score, index) for index, score in pairs]
    body = msgspec.json.encode(RerankAnswer(results, data.model))
    return await respond(request, body, data.model, len(texts), answer.usage)


@get("/", sync_to_thread=False)
def root() -> Root:
    """Where to go on."""
    return Root("embedding-server", __version__, "/swagger-ui")


@get("/docs", include_in_schema=False, sync_to_thread=False)
def documentation() -> Redirect:
    """To the page that describes the API."""
    return Redirect("/swagger-ui")


SHAPES: dict[str, Shape] = dict.fromkeys(("/api/v1", "/info", "/"), unified_error)
HANDLERS: list[Any] = [embed, embed_sparse, rerank, root, documentation]
