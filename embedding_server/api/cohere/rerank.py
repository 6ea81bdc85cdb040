"""The rerank route of Cohere, versions 1 and 2, which Jina's and vLLM's clients use too."""

from typing import Annotated, ClassVar

import msgspec
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import UNSET, Meta, UnsetType

from embedding_server.api.body import ApiRequest
from embedding_server.api.cohere.answers import AnswerMeta, Billed, meta
from embedding_server.api.declared import INFERENCE, MODEL, answers
from embedding_server.api.inference import (
    UNSUPPORTED,
    Model,
    checked_documents,
    plain_options,
    respond,
)
from embedding_server.api.middleware import event
from embedding_server.api.parts import parts
from embedding_server.core import Task
from embedding_server.errors import BadRequest


class Document(msgspec.Struct, frozen=True):
    """A document as an object."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A query and documents to order by relevance to it."""

    examples: ClassVar = [
        {"model": MODEL, "query": "a pet", "documents": ["a cat", "a sofa"], "top_n": 1}
    ]

    model: Model | None = None
    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Meta(ge=1)] | None = None
    max_chunks_per_doc: Annotated[int | None, Meta(extra_json_schema=UNSUPPORTED)] = None
    rank_fields: Annotated[list[str] | None, Meta(extra_json_schema=UNSUPPORTED)] = None

    def texts(self) -> list[str]:
        """The documents; raises `BadRequest` for options that are not supported."""
        if self.max_chunks_per_doc is not None:
            raise BadRequest("max_chunks_per_doc is not supported: say max_tokens_per_doc")
        if self.rank_fields is not None:
            raise BadRequest("rank_fields is not supported: send each document as one text")
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Ranked(msgspec.Struct, omit_defaults=True):
    """A document: `index` is its place in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class TokenCount(msgspec.Struct):
    """Real tokens, as Jina's answers say it."""

    total_tokens: int
    prompt_tokens: int


class RerankAnswer(msgspec.Struct):
    """Best first, ties in request order."""

    id: str
    model: str
    results: list[Ranked]
    meta: AnswerMeta
    usage: TokenCount


_ANSWERS = answers(RerankAnswer)


@post("/v1/rerank", status_code=200, opt={INFERENCE: Task.RERANK}, responses=_ANSWERS)
async def rerank_v1(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order documents by relevance to a query, and send them back unless told not to."""
    return await _rerank(request, data, "1", documents=data.return_documents is not False)


@post("/v2/rerank", status_code=200, opt={INFERENCE: Task.RERANK}, responses=_ANSWERS)
async def rerank_v2(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order documents by relevance to a query."""
    return await _rerank(request, data, "2", documents=data.return_documents is True)


async def _rerank(
    request: ApiRequest, data: RerankRequest, version: str, *, documents: bool
) -> ASGIResponse:
    texts, engine = checked_documents(data.texts()), parts(request).engine
    model = data.model or engine.default(Task.RERANK)
    options = msgspec.structs.replace(
        plain_options(request), document_tokens=data.max_tokens_per_doc, raw_scores=False
    )
    answer = await engine.rerank(model, data.query, texts, data.top_n, options)
    tokens = answer.usage.tokens
    body = RerankAnswer(
        id=event(request.scope)["request_id"],
        model=model,
        results=[
            Ranked(index, score, Document(texts[index]) if documents else UNSET)
            for index, score in zip(answer.order, answer.scores, strict=True)
        ],
        meta=meta(version, answer.usage, Billed(search_units=1)),
        usage=TokenCount(tokens, tokens),
    )
    content = msgspec.json.encode(body)
    return await respond(request, content, model, len(texts), answer.usage)
