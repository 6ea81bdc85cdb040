"""The native dialect: `/api/embed`, `/api/embed/batch`, `/api/rerank` and the model lists."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import UNSET, Meta, UnsetType

from embedding_server.api.body import ApiRequest
from embedding_server.api.encode import base64_row, json_items, json_object, json_rows
from embedding_server.api.errors import ERRORS
from embedding_server.api.inference import Dimensions, Model, Timeout, deadline, respond
from embedding_server.api.middleware import INFERENCE, client_of
from embedding_server.api.parts import parts
from embedding_server.core import Task
from embedding_server.errors import BadRequest
from embedding_server.serving.engine import Options
from embedding_server.serving.profile import Quality
from embedding_server.serving.registry import Resident

_MAX_DOCUMENTS = 1000


class _EmbedOptions(msgspec.Struct, kw_only=True, frozen=True):
    model: Model
    dimensions: Dimensions | None = None
    truncate: bool = True
    input_type: Literal["query", "document"] | None = None
    prompt: Annotated[str, Meta(description="put before every text")] | None = None
    normalize: bool = True
    encoding_format: Literal["float", "base64"] = "float"
    timeout_ms: Timeout | None = None

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        return Options(
            dimensions=self.dimensions,
            normalize=self.normalize,
            truncate=self.truncate,
            input_type=self.input_type,
            prompt=self.prompt,
            timeout=deadline(request, self.timeout_ms),
            client=client_of(request.scope),
        )


class EmbedRequest(_EmbedOptions, kw_only=True, frozen=True):
    """One text as `text`, or one or several as `input`."""

    text: str | None = None
    input: str | list[str] | None = None

    def texts(self) -> list[str]:
        """The texts to embed; raises `BadRequest`."""
        given = self.input if self.text is None else self.text
        if given is None or (self.text is not None and self.input is not None):
            raise BadRequest("give either text or input")
        return [given] if isinstance(given, str) else given


class EmbedBatchRequest(_EmbedOptions, kw_only=True, frozen=True):
    """Several texts, as `texts` or as `input`."""

    texts_: list[str] | None = msgspec.field(default=None, name="texts")
    input: list[str] | None = None

    def texts(self) -> list[str]:
        """The texts to embed; raises `BadRequest`."""
        given = self.input if self.texts_ is None else self.texts_
        if given is None or (self.texts_ is not None and self.input is not None):
            raise BadRequest("give either texts or input")
        return given


class EmbedAnswer(msgspec.Struct):
    """One row per text, in order.

    With `encoding_format: base64` each row is a string of little-endian float32.
    """

    embeddings: list[list[float] | str]
    model: str
    count: int
    dimensions: int


class Document(msgspec.Struct, frozen=True):
    """A document with an id of the client's own."""

    text: str
    id: str | UnsetType = UNSET


class RerankRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A query and the documents to order by relevance to it."""

    model: Model
    query: str
    documents: list[str | Document]
    top_k: int | None = None
    top_n: int | None = None
    return_scores: bool = True
    truncate: bool = True
    timeout_ms: Timeout | None = None


class Ranked(msgspec.Struct):
    """One document: `index` is its position in the request."""

    index: int
    text: str
    id: str | UnsetType = UNSET
    score: float | UnsetType = UNSET


class RerankAnswer(msgspec.Struct):
    """Best first, ties in request order."""

    results: list[Ranked]
    model: str


class ModelRow(msgspec.Struct):
    """One allowed model; `dimensions` is left out for rerankers.

    `quality` is that of a reduced precision, once the model is loaded.
    """

    id: str
    name: str
    description: str
    model_type: Literal["embedding", "reranker"]
    dimensions: int | UnsetType = UNSET
    quality: Quality | UnsetType = UNSET


@post(
    "/api/embed",
    status_code=200,
    opt={INFERENCE: True},
    responses={200: ResponseSpec(EmbedAnswer, generate_examples=False), **ERRORS},
)
async def embed(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """Embed one text or several."""
    return await _embed(request, data, data.texts())


@post(
    "/api/embed/batch",
    status_code=200,
    opt={INFERENCE: True},
    responses={200: ResponseSpec(EmbedAnswer, generate_examples=False), **ERRORS},
)
async def embed_batch(request: ApiRequest, data: JSONBody[EmbedBatchRequest]) -> ASGIResponse:
    """Embed several texts."""
    return await _embed(request, data, data.texts())


async def _embed(request: ApiRequest, data: _EmbedOptions, texts: list[str]) -> ASGIResponse:
    limit = parts(request).settings.max_batch_size
    if len(texts) > limit:
        raise BadRequest(f"Batch size {len(texts)} exceeds maximum {limit}")
    answer = await parts(request).engine.embed(data.model, texts, data.options(request))
    encoded = (
        await json_items(answer.rows, lambda _, row: base64_row(row))
        if data.encoding_format == "base64"
        else await json_rows(answer.rows)
    )
    body = json_object(
        embeddings=encoded,
        model=data.model,
        count=len(texts),
        dimensions=answer.rows.shape[1],
    )
    return await respond(request, body, data.model, len(texts), answer.usage)


@post(
    "/api/rerank",
    status_code=200,
    opt={INFERENCE: True},
    responses={200: ResponseSpec(RerankAnswer, generate_examples=False), **ERRORS},
)
async def rerank(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order documents by relevance to a query."""
    documents = [Document(one) if isinstance(one, str) else one for one in data.documents]
    if len(documents) > _MAX_DOCUMENTS:
        raise BadRequest(f"{len(documents)} documents exceed the maximum of {_MAX_DOCUMENTS}")
    tops = [top for top in (data.top_k, data.top_n) if top is not None]
    answer = await parts(request).engine.rerank(
        data.model,
        data.query,
        [one.text for one in documents],
        min(tops, default=None),
        Options(
            truncate=data.truncate,
            timeout=deadline(request, data.timeout_ms),
            client=client_of(request.scope),
        ),
    )
    results = [
        Ranked(
            index=index,
            text=documents[index].text,
            id=documents[index].id,
            score=score if data.return_scores else UNSET,
        )
        for index, score in zip(answer.order, answer.scores, strict=True)
    ]
    body = msgspec.json.encode(RerankAnswer(results=results, model=data.model))
    return await respond(request, body, data.model, len(documents), answer.usage)


@get("/api/embedders", sync_to_thread=False)
def embedders(request: ApiRequest) -> list[ModelRow]:
    """The allowed embedding models, by name."""
    return _rows(request, Task.EMBED)


@get("/api/rerankers", sync_to_thread=False)
def rerankers(request: ApiRequest) -> list[ModelRow]:
    """The allowed rerankers, by name."""
    return _rows(request, Task.RERANK)


def _rows(request: ApiRequest, task: Task) -> list[ModelRow]:
    engine, embedding = parts(request).engine, task is Task.EMBED
    return [
        ModelRow(
            id=name,
            name=name,
            description=spec.description,
            model_type="embedding" if embedding else "reranker",
            dimensions=spec.dimensions if embedding else UNSET,
            quality=_quality(engine.registry.residents[spec.id]),
        )
        for name, spec in sorted(engine.catalog.listed[task].items())
    ]


def _quality(resident: Resident) -> Quality | UnsetType:
    return (resident.model.quality if resident.model else None) or UNSET


HANDLERS: list[Any] = [embed, embed_batch, rerank, embedders, rerankers]
