"""Cohere's embed, versions 1 and 2."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import UNSET, Meta, UnsetType

from embedding_server.api.body import ApiRequest
from embedding_server.api.cohere.answers import AnswerMeta, Billed, meta
from embedding_server.api.declared import INFERENCE, KINDS, MODEL, answers, exactly_one
from embedding_server.api.encode import (
    base64_row,
    json_items,
    json_object,
    json_vectors,
    quantized,
)
from embedding_server.api.images import image_files
from embedding_server.api.inference import (
    UNSUPPORTED,
    Dimensions,
    Model,
    checked_count,
    plain_options,
    respond,
)
from embedding_server.api.middleware import event
from embedding_server.api.parts import parts
from embedding_server.core import Embeddings, Kind, Task
from embedding_server.errors import BadRequest
from embedding_server.serving.options import ONE_VECTOR, Input, Options

_MAX_INPUTS = 96
"""Cohere's own limit."""

Form = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
Truncate = Literal["NONE", "START", "END"]
InputType = Literal["search_document", "search_query", "classification", "clustering", "image"]

_PROMPTS = {"search_document": "document", "search_query": "query"}
"""Input types by the names that models' prompts have; others go by their own."""
_TRUNCATION: Mapping[Truncate, Mapping[str, Any]] = {
    "NONE": {"truncate": False},
    "START": {"side": "left"},
    "END": {"side": "right"},
}


class ImageUrl(msgspec.Struct, frozen=True):
    """An image as a data URI."""

    url: str


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A text, or a part of one."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image."""

    image_url: ImageUrl


_ALL_TEXTS = {"items": {"properties": {"type": {"const": "text"}}}}
_ONE_OR_TEXTS = {"anyOf": [{"maxItems": 1}, _ALL_TEXTS]}


class Content(msgspec.Struct, frozen=True):
    """One input: a text, in one part or several, or an image."""

    content: Annotated[list[TextPart | ImagePart], Meta(extra_json_schema=_ONE_OR_TEXTS)]

    def input(self) -> Input:
        """The text or the image file; raises `BadRequest` where it is both."""
        texts = [part.text for part in self.content if isinstance(part, TextPart)]
        images = [part.image_url.url for part in self.content if isinstance(part, ImagePart)]
        if images and len(self.content) > 1:
            raise BadRequest("an input is a text or one image: text beside images is not supported")
        return image_files(images)[0] if images else "".join(texts)


class EmbedRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Texts as `texts` or `inputs`, or images; v2 wants an `input_type` for models with prompts."""

    examples: ClassVar = [
        {"model": MODEL, "texts": ["a cat", "a dog"], "input_type": "search_document"}
    ]
    rule: ClassVar = exactly_one("texts", "inputs", "images")

    model: Model | None = None
    texts: list[str] | None = None
    inputs: list[Content] | None = None
    images: list[str] | None = None
    input_type: InputType | None = None
    embedding_types: list[Form] | None = None
    output_dimension: Dimensions | None = None
    truncate: Truncate = "END"
    max_tokens: Annotated[int | None, Meta(extra_json_schema=UNSUPPORTED)] = None

    def input(self) -> list[Input]:
        """What to embed; raises `BadRequest`."""
        if sum(one is not None for one in (self.texts, self.inputs, self.images)) != 1:
            raise BadRequest("give either texts, inputs or images")
        if self.max_tokens is not None:
            raise BadRequest("max_tokens is not supported: a text's limit is the model's")
        given = [one.input() for one in self.inputs or []]
        given += [*(self.texts or []), *image_files(self.images or [])]
        if len({isinstance(one, bytes) for one in given}) > 1:
            raise BadRequest("inputs mixes texts and images: send them one after the other")
        if self.input_type == "image" and any(isinstance(one, str) for one in given):
            raise BadRequest("input_type is image, and there are texts")
        return given

    def options(self, request: ApiRequest) -> Options:
        """The engine's options."""
        wanted = self.input_type
        return msgspec.structs.replace(
            plain_options(request),
            dimensions=self.output_dimension,
            input_type=_PROMPTS.get(wanted, wanted) if wanted else None,
            **_TRUNCATION[self.truncate],
        )


class TypedEmbeddings(msgspec.Struct, omit_defaults=True):
    """One vector per input in every form that was asked for."""

    floats: list[list[float]] | UnsetType = msgspec.field(default=UNSET, name="float")
    int8: list[list[int]] | UnsetType = UNSET
    uint8: list[list[int]] | UnsetType = UNSET
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET
    base64: list[str] | UnsetType = UNSET


class EmbedAnswerV1(msgspec.Struct):
    """The vectors in floats or, where `embedding_types` were given, by type."""

    id: str
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    embeddings: list[list[float]] | TypedEmbeddings
    texts: list[str]
    meta: AnswerMeta


class EmbedAnswerV2(msgspec.Struct):
    """The vectors by type."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: TypedEmbeddings
    texts: list[str]
    meta: AnswerMeta


@post(
    "/v1/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (*ONE_VECTOR, Kind.IMAGE)},
    responses=answers(EmbedAnswerV1),
)
async def embed_v1(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """Embed texts, or images."""
    return await _embed(request, data, "1")


@post(
    "/v2/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (*ONE_VECTOR, Kind.IMAGE)},
    responses=answers(EmbedAnswerV2),
)
async def embed_v2(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """Embed texts, or images, by type."""
    return await _embed(request, data, "2")


async def _embed(request: ApiRequest, data: EmbedRequest, version: str) -> ASGIResponse:
    inputs, engine = checked_count(request, data.input(), _MAX_INPUTS), parts(request).engine
    kinds = (Kind.IMAGE,) if any(isinstance(one, bytes) for one in inputs) else ONE_VECTOR
    model = data.model or engine.default(Task.EMBED, kinds)
    prompts = engine.described(model).prompts
    if version == "2" and data.input_type is None and any(prompts.values()):
        raise BadRequest(f"input_type is required: {model} has prompts of its own")
    answer = await engine.embed(model, inputs, data.options(request), kinds)
    if version == "1" and not data.embedding_types:
        kind, vectors = "embeddings_floats", await _floats(answer)
    else:
        kind, vectors = "embeddings_by_type", await _by_type(answer, data.embedding_types)
    body = json_object(
        id=event(request.scope)["request_id"],
        response_type=kind,
        embeddings=vectors,
        texts=[one for one in inputs if isinstance(one, str)],
        meta=msgspec.json.encode(
            meta(version, answer.usage, Billed(input_tokens=answer.usage.tokens))
        ),
    )
    return await respond(request, body, model, len(inputs), answer.usage)


_DEFAULT: tuple[Form, ...] = ("float",)


async def _by_type(answer: Embeddings, forms: list[Form] | None) -> bytes:
    written = {form: await _FORMS[form](answer) for form in forms or _DEFAULT}
    return json_object(**written)


async def _floats(answer: Embeddings) -> bytes:
    return await json_vectors(answer.vectors)


async def _base64(answer: Embeddings) -> bytes:
    return await json_items(answer.vectors, lambda _, vector: base64_row(vector))


def _quantized(form: Literal["int8", "uint8", "binary", "ubinary"]) -> "_Write":
    async def write(answer: Embeddings) -> bytes:
        rows = np.asarray(answer.vectors, np.float32).reshape(-1, answer.dimensions)
        if not answer.limit and form in ("int8", "uint8"):
            raise BadRequest(f"embedding_types: the model has no range for {form}")
        return await json_vectors(quantized(rows, form, answer.limit))

    return write


_Write = Callable[[Embeddings], Awaitable[bytes]]
_FORMS: Mapping[Form, _Write] = {
    "float": _floats,
    "base64": _base64,
    "int8": _quantized("int8"),
    "uint8": _quantized("uint8"),
    "binary": _quantized("binary"),
    "ubinary": _quantized("ubinary"),
}
