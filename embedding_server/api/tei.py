"""The API of text-embeddings-inference; which model it asks for, the settings say.

Its `/embed` is in `shared` too, for servers that have another dialect with this path.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import UNSET, Meta, UnsetType

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import HEADERS, INFERENCE, KINDS, answers, any_of
from embedding_server.api.encode import Weight, json_vectors
from embedding_server.api.errors import Shape
from embedding_server.api.inference import (
    NO_MIX,
    Dimensions,
    Given,
    Inputs,
    TokenId,
    checked_count,
    checked_documents,
    checked_inputs,
    plain_options,
    respond,
)
from embedding_server.api.parts import parts
from embedding_server.core import Kind, Piece, Task, Tokens, Usage
from embedding_server.errors import (
    BadRequest,
    DeadlineExceeded,
    EmbeddingError,
    InternalError,
    ModelLoadError,
    RateLimited,
    RerankError,
    ServiceError,
    ServiceUnavailable,
    UnsupportedModel,
)
from embedding_server.serving.options import ONE_VECTOR, Options

MAX_INPUTS = 32
"""TEI's own limit."""

TIMES = {
    "X-Total-Time": "milliseconds",
    "X-Tokenization-Time": "milliseconds",
    "X-Queue-Time": "milliseconds",
    "X-Inference-Time": "milliseconds",
    "X-Compute-Characters": "of all texts",
    "X-Compute-Tokens": "real ones, special ones included",
}
"""Headers of its answers."""

Direction = Literal["Left", "Right", "left", "right"]


class Failure(msgspec.Struct):
    """The body of every failure."""

    error: str
    error_type: str


_STATUSES: dict[type[ServiceError], tuple[int, str]] = {
    BadRequest: (422, "Validation"),
    UnsupportedModel: (424, "Backend"),
    EmbeddingError: (424, "Backend"),
    RerankError: (424, "Backend"),
    InternalError: (500, "Backend"),
    DeadlineExceeded: (504, "Backend"),
    RateLimited: (429, "Overloaded"),
    ModelLoadError: (503, "Unhealthy"),
    ServiceUnavailable: (429, "Overloaded"),
}


def tei_error(error: ServiceError, _: str) -> tuple[int, Failure]:
    """A failure in TEI's `Shape`: overload is a 429 there, and a draining server unhealthy."""
    status, kind = _STATUSES.get(type(error), (error.status, "Validation"))
    if isinstance(error, ServiceUnavailable) and error.reason == "draining":
        status, kind = error.status, "Unhealthy"
    return status, Failure(error.text, kind)


class TextOptions(msgspec.Struct, kw_only=True, frozen=True):
    """How texts are read; `truncate` null is true."""

    truncate: bool | None = True
    truncation_direction: Direction = "Right"
    prompt_name: str | None = None

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        return msgspec.structs.replace(
            plain_options(request),
            truncate=self.truncate is not False,
            side="left" if self.truncation_direction.lower() == "left" else "right",
            prompt_name=self.prompt_name,
        )


class VectorOptions(TextOptions, kw_only=True, frozen=True):
    """How vectors are given."""

    normalize: bool = True
    dimensions: Dimensions | None = None

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        return msgspec.structs.replace(
            super().options(request), normalize=self.normalize, dimensions=self.dimensions
        )


class InputsRequest(TextOptions, kw_only=True, frozen=True):
    """Texts, or token ids of them."""

    examples: ClassVar = [{"inputs": ["a cat", "a dog"]}]

    inputs: Inputs


class RerankRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A query and texts to order by relevance to it."""

    examples: ClassVar = [{"query": "a pet", "texts": ["a cat", "a sofa"]}]

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = True
    truncation_direction: Direction = "Right"


class Ranked(msgspec.Struct):
    """A text: `index` is its place in the request."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class Sentences(msgspec.Struct, frozen=True):
    """What is compared with what."""

    source_sentence: str
    sentences: list[str]


class SimilarityRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A sentence and those to compare it with."""

    examples: ClassVar = [{"inputs": {"source_sentence": "a cat", "sentences": ["a dog"]}}]

    inputs: Sentences
    parameters: TextOptions | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Texts."""

    examples: ClassVar = [{"inputs": "a cat"}]

    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Token ids of one text, or of several."""

    examples: ClassVar = [{"ids": [5, 6]}]

    ids: Annotated[list[TokenId | list[TokenId]], Meta(extra_json_schema={"allOf": [NO_MIX]})]
    skip_special_tokens: bool = True


async def embed(
    request: ApiRequest, given: Given, options: Options, kinds: tuple[Kind, ...]
) -> ASGIResponse:
    """TEI's answer with what a model of one of these kinds makes of each input."""
    started, engine = time.perf_counter(), parts(request).engine
    model, inputs = engine.default(Task.EMBED, kinds), checked_inputs(request, given, MAX_INPUTS)
    answer = await engine.embed(model, inputs, options, kinds)
    body = await json_vectors(answer.vectors)
    headers = _headers(answer.usage, sum(map(len, inputs)), started)
    return await respond(request, body, model, len(inputs), answer.usage, headers=headers)


def _headers(usage: Usage, chars: int, started: float) -> dict[str, str]:
    seconds = (time.perf_counter() - started, usage.tokenizing, usage.waited, usage.running)
    numbers = (*(round(1000 * one) for one in seconds), chars, usage.tokens)
    return dict(zip(TIMES, map(str, numbers), strict=True))


@post(
    "/embed_all",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (Kind.MULTI,), HEADERS: TIMES},
    responses=answers(list[list[list[float]]]),
)
async def embed_all(request: ApiRequest, data: JSONBody[InputsRequest]) -> ASGIResponse:
    """A vector per token of each text, of a late-interaction model."""
    return await embed(request, data.inputs, data.options(request), (Kind.MULTI,))


@post(
    "/embed_sparse",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (Kind.SPARSE,), HEADERS: TIMES},
    responses=answers(list[list[Weight]]),
)
async def embed_sparse(request: ApiRequest, data: JSONBody[InputsRequest]) -> ASGIResponse:
    """Weights of words."""
    return await embed(request, data.inputs, data.options(request), (Kind.SPARSE,))


@post(
    "/rerank",
    status_code=200,
    opt={INFERENCE: Task.RERANK, HEADERS: TIMES},
    responses=answers(list[Ranked]),
)
async def rerank(request: ApiRequest, data: JSONBody[RerankRequest]) -> ASGIResponse:
    """Order texts by relevance to a query."""
    return await reranked(request, data.query, data.texts, data)


async def reranked(
    request: ApiRequest, query: str, given: Sequence[str], data: "RerankRequest | RootRequest"
) -> ASGIResponse:
    """TEI's answer to a rerank request."""
    started, engine = time.perf_counter(), parts(request).engine
    texts, model = checked_documents(given), engine.default(Task.RERANK)
    how = TextOptions(truncate=data.truncate, truncation_direction=data.truncation_direction)
    options = msgspec.structs.replace(how.options(request), raw_scores=data.raw_scores)
    answer = await engine.rerank(model, query, texts, None, options)
    ranked = [
        Ranked(index, score, texts[index] if data.return_text else UNSET)
        for index, score in zip(answer.order, answer.scores, strict=True)
    ]
    headers = _headers(answer.usage, sum(map(len, [query, *texts])), started)
    body = msgspec.json.encode(ranked)
    return await respond(request, body, model, len(texts), answer.usage, headers=headers)


@post(
    "/similarity",
    status_code=200,
    opt={INFERENCE: Task.EMBED, HEADERS: TIMES},
    responses=answers(list[float]),
)
async def similarity(request: ApiRequest, data: JSONBody[SimilarityRequest]) -> ASGIResponse:
    """Cosines of a sentence with others."""
    return await similarities(request, data.inputs, data.parameters)


async def similarities(
    request: ApiRequest, given: Sentences, how: TextOptions | None
) -> ASGIResponse:
    """TEI's answer to a similarity request."""
    started, engine = time.perf_counter(), parts(request).engine
    model = engine.default(Task.EMBED, ONE_VECTOR)
    texts = [given.source_sentence, *checked_documents(given.sentences)]
    answer = await engine.embed(model, texts, (how or TextOptions()).options(request))
    rows = answer.vectors
    body = await json_vectors(np.asarray(rows[1:]) @ rows[0])
    headers = _headers(answer.usage, sum(map(len, texts)), started)
    return await respond(request, body, model, len(texts), answer.usage, headers=headers)


@post("/tokenize", status_code=200, responses=answers(list[list[Piece]]))
async def tokenize(request: ApiRequest, data: JSONBody[TokenizeRequest]) -> list[list[Piece]]:
    """The tokens of each text, with their places in it."""
    engine = parts(request).engine
    texts = [data.inputs] if isinstance(data.inputs, str) else data.inputs
    options = TextOptions(prompt_name=data.prompt_name).options(request)
    return await engine.pieces(
        any_model(request),
        checked_count(request, texts, MAX_INPUTS),
        options,
        specials=data.add_special_tokens,
    )


@post("/decode", status_code=200, responses=answers(list[str]))
async def decode(request: ApiRequest, data: JSONBody[DecodeRequest]) -> list[str]:
    """The text of each list of token ids."""
    ids = [one for one in checked_inputs(request, data.ids, MAX_INPUTS) if isinstance(one, Tokens)]
    return await parts(request).engine.detokenize(
        any_model(request), ids, plain_options(request), skip_specials=data.skip_special_tokens
    )


def any_model(request: ApiRequest) -> str:
    """The model of requests of no task: `/embed`'s, or where it has none, the only other one."""
    engine = parts(request).engine
    embedders = [engine.described(name).kind for name in engine.catalog.listed[Task.EMBED]]
    if not set(ONE_VECTOR).isdisjoint(embedders):
        return engine.default(Task.EMBED, ONE_VECTOR)
    return engine.default(Task.EMBED if embedders else Task.RERANK)


class EmbedRequest(VectorOptions, kw_only=True, frozen=True):
    """Texts, or token ids of them."""

    examples: ClassVar = [{"inputs": ["a cat", "a dog"]}]

    inputs: Inputs


@post(
    "/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED, HEADERS: TIMES},
    responses=answers(list[list[float]]),
)
async def embed_alone(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """One vector per text."""
    return await embed(request, data.inputs, data.options(request), ONE_VECTOR)


class RootRequest(VectorOptions, kw_only=True, frozen=True):
    """What `/embed`, `/similarity` or `/rerank` take: the fields say which of them is meant."""

    examples: ClassVar = [{"inputs": "a cat"}, {"query": "a pet", "texts": ["a cat", "a sofa"]}]
    rule: ClassVar = any_of(("inputs",), ("query", "texts"))

    inputs: Inputs | Sentences | None = None
    parameters: TextOptions | None = None
    query: str | None = None
    texts: list[str] | None = None
    raw_scores: bool = False
    return_text: bool = False


@post(
    "/",
    status_code=200,
    opt={INFERENCE: Task.EMBED, HEADERS: TIMES},
    responses=answers(list[list[float]], list[float], list[Ranked]),
)
async def infer(request: ApiRequest, data: JSONBody[RootRequest]) -> ASGIResponse:
    """Vectors of `inputs`, cosines of sentences in it, or `texts` ordered by `query`."""
    if isinstance(data.inputs, Sentences):
        return await similarities(request, data.inputs, data.parameters)
    if data.inputs is not None:
        return await embed(request, data.inputs, data.options(request), ONE_VECTOR)
    if data.query is None or data.texts is None:
        raise BadRequest("give inputs, or query and texts")
    return await reranked(request, data.query, data.texts, data)


SHAPES: dict[str, Shape] = dict.fromkeys(
    (
        "/", "/embed", "/embed_all", "/embed_sparse", "/rerank", "/similarity", "/tokenize",
        "/decode", "/info",
    ),
    tei_error,
)  # fmt: skip
HANDLERS: list[Any] = [embed_all, embed_sparse, rerank, similarity, tokenize, decode, infer]
