"""The native dialect: `/api/embed`, `/api/embed/batch`, `/api/rerank` and the model lists."""

from typing import Any, ClassVar, Literal

import msgspec
from litestar import get, post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import UNSET, UnsetType

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import INFERENCE, KINDS, MODEL, answers, exactly_one
from embedding_server.api.errors import Shape, native_error
from embedding_server.api.inference import (
    EmbedOptions,
    Given,
    Inputs,
    Model,
    Timeout,
    Top,
    VectorOptions,
    checked_documents,
    checked_inputs,
    deadline,
    either,
    respond,
    respond_with_vectors,
)
from embedding_server.api.middleware import client_of
from embedding_server.api.parts import parts
from embedding_server.core import Kind, Side, Task
from embedding_server.errors import BadRequest
from embedding_server.serving.options import ONE_VECTOR, Options
from embedding_server.serving.profile import Quality
from embedding_server.serving.registry import Resident


class EmbedRequest(VectorOptions, kw_only=True, frozen=True):
    """One text as `text`, or one or several as `input`."""

    examples: ClassVar = [
        {"model": MODEL, "text": "a cat"},
        {"model": MODEL, "input": ["a cat", "a dog"]},
    ]
    rule: ClassVar = EmbedOptions.rule | exactly_one("text", "input")

    text: str | None = None
    input: Inputs | None = None
    output: Literal["vector", "tokens"] = "vector"

    def texts(self) -> Given:
        """The texts to embed; raises `BadRequest`."""
        return either(self.text, self.input)


class EmbedBatchRequest(VectorOptions, kw_only=True, frozen=True):
    """Several texts, as `texts` or as `input`."""

    examples: ClassVar = [{"model": MODEL, "texts": ["a cat", "a dog"]}]
    rule: ClassVar = EmbedOptions.rule | exactly_one("texts", "input")

    output: Literal["vector", "tokens"] = "vector"
    texts_: list[str] | None = msgspec.field(default=None, name="texts")
    input: list[str] | None = None

    def texts(self) -> list[str]:
        """The texts to embed; raises `BadRequest`."""
        given = self.input if self.texts_ is None else self.texts_
        if given is None or (self.texts_ is not None and self.input is not None):
            raise BadRequest("give either texts or input")
        return given


class EmbedAnswer(msgspec.Struct):
    """One vector per text, in order, or with `output: tokens` a list of vectors per text.

    With `encoding_format: base64` each vector is a string of little-endian float32.
    """

    embeddings: list[list[float | list[float] | str] | str]
    model: str
    count: int
    dimensions: int


class Document(msgspec.Struct, frozen=True):
    """A document with an id of the client's own."""

    text: str
    id: str | UnsetType = UNSET


class RerankRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A query and the documents to order by relevance to it."""

    examples: ClassVar = [
        {"model": MODEL, "query": "a pet", "documents": ["a cat", {"id": "7", "text": "a sofa"}]}
    ]

    model: Model
    query: str
    documents: list[str | Document]
    top_k: Top | None = None
    top_n: Top | None = None
    return_scores: bool = True
    truncate: bool = True
    truncation_direction: Side = "right"
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

    `kind` says what it makes of an input, and so which route serves it. `quality` is that of a
    reduced precision, once the model is loaded.
    """

    id: str
    name: str
    description: str
    model_type: Literal["embedding", "reranker"]
    kind: Kind
    dimensions: int | UnsetType = UNSET
    quality: Quality | UnsetType = UNSET


@post(
    "/api/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (*ONE_VECTOR, Kind.MULTI)},
    responses=answers(EmbedAnswer),
)
async def embed(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """Embed one text or several."""
    return await _embed(request, data, data.texts())


@post(
    "/api/embed/batch",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (*ONE_VECTOR, Kind.MULTI)},
    responses=answers(EmbedAnswer),
)
async def embed_batch(request: ApiRequest, data: JSONBody[EmbedBatchRequest]) -> ASGIResponse:
    """Embed several texts."""
    return await _embed(request, data, data.texts())


async def _embed(
    request: ApiRequest, data: EmbedRequest | EmbedBatchRequest, given: Given
) -> ASGIResponse:
    kinds = (Kind.MULTI,) if data.output == "tokens" else ONE_VECTOR
    answer = await parts(request).engine.embed(
        data.model, checked_inputs(request, given), data.options(request), kinds
    )
    return await respond_with_vectors(request, data, answer)


@post(
    "/api/rerank",
    status_code=200,
    opt={INFERENCE: Task.RERANK},
    responses=answers(RerankAnswer),
)
async def rerank(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order documents by relevance to a query."""
    given = checked_documents(data.documents)
    documents = [Document(one) if isinstance(one, str) else one for one in given]
    tops = [top for top in (data.top_k, data.top_n) if top is not None]
    answer = await parts(request).engine.rerank(
        data.model,
        data.query,
        [one.text for one in documents],
        min(tops, default=None),
        Options(
            truncate=data.truncate,
            side=data.truncation_direction,
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
    engine = parts(request).engine
    residents = engine.registry.residents
    return [
        _row(name, residents[spec.id], task)
        for name, spec in sorted(engine.catalog.listed[task].items())
    ]


def _row(name: str, resident: Resident, task: Task) -> ModelRow:
    """One model; its dimensions are not known while the hub cannot be asked about it."""
    embedding = task is Task.EMBED
    return ModelRow(
        id=name,
        name=name,
        description=resident.spec.description,
        model_type="embedding" if embedding else "reranker",
        kind=resident.spec.kind,
        dimensions=(embedding and resident.spec.dimensions) or UNSET,
        quality=_quality(resident),
    )


def _quality(resident: Resident) -> Quality | UnsetType:
    return (resident.model.quality if resident.model else None) or UNSET


SHAPES: dict[str, Shape] = {"": native_error}
HANDLERS: list[Any] = [embed, embed_batch, rerank, embedders, rerankers]
