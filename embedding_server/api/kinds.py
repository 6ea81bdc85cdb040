"""The native dialect's routes for other vectors and inputs: sparse ones, and images."""

from typing import Any, ClassVar

import msgspec
from litestar import post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import INFERENCE, KINDS, MODEL, answers, exactly_one
from embedding_server.api.encode import json_items, json_object
from embedding_server.api.images import DOT, image_files
from embedding_server.api.inference import (
    EmbedOptions,
    Inputs,
    VectorOptions,
    checked_count,
    checked_inputs,
    either,
    respond,
    respond_with_vectors,
)
from embedding_server.api.parts import parts
from embedding_server.core import Kind, Task, Vector
from embedding_server.errors import BadRequest


class SparseRequest(EmbedOptions, kw_only=True, frozen=True):
    """One text as `text`, or one or several as `input`; `input_type: query` for queries."""

    examples: ClassVar = [{"model": MODEL, "text": "a cat"}]
    rule: ClassVar = EmbedOptions.rule | exactly_one("text", "input")

    text: str | None = None
    input: Inputs | None = None


class SparseVector(msgspec.Struct):
    """Weights of words: `values[i]` belongs to the word `indices[i]`; indices ascend."""

    indices: list[int]
    values: list[float]


class SparseAnswer(msgspec.Struct):
    """One vector per text, in order."""

    embeddings: list[SparseVector]
    model: str
    count: int


class ImageRequest(VectorOptions, kw_only=True, frozen=True):
    """PNG, JPEG or WebP files in base64, bare or as data URIs: one as `image`, or as `images`."""

    examples: ClassVar = [{"model": MODEL, "image": DOT}]
    rule: ClassVar = EmbedOptions.rule | exactly_one("image", "images")

    image: str | None = None
    images: list[str] | None = None

    def files(self) -> list[bytes]:
        """The files; raises `BadRequest`."""
        if (self.image is None) == (self.images is None):
            raise BadRequest("give either image or images")
        given = [self.image] if self.image is not None else self.images or []
        return image_files(given)


class ImageAnswer(msgspec.Struct):
    """One vector per image, in order; of late-interaction models a list of vectors per image."""

    embeddings: list[list[float | list[float] | str] | str]
    model: str
    count: int
    dimensions: int


@post(
    "/api/embed/sparse",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (Kind.SPARSE,)},
    responses=answers(SparseAnswer),
)
async def embed_sparse(request: ApiRequest, data: JSONBody[SparseRequest]) -> ASGIResponse:
    """Sparse vectors of one text or several."""
    texts = checked_inputs(request, either(data.text, data.input))
    answer = await parts(request).engine.embed(
        data.model, texts, data.options(request), (Kind.SPARSE,)
    )
    body = json_object(
        embeddings=await json_items(answer.vectors, _sparse_item),
        model=data.model,
        count=len(texts),
    )
    return await respond(request, body, data.model, len(texts), answer.usage)


@post(
    "/api/embed/image",
    status_code=200,
    opt={INFERENCE: Task.EMBED, KINDS: (Kind.IMAGE, Kind.MULTI)},
    responses=answers(ImageAnswer),
)
async def embed_image(request: ApiRequest, data: JSONBody[ImageRequest]) -> ASGIResponse:
    """Vectors of one image or several, in the space of the model's text tower if it has one."""
    files = checked_count(request, data.files())
    answer = await parts(request).engine.embed(
        data.model, files, data.options(request), (Kind.IMAGE, Kind.MULTI)
    )
    return await respond_with_vectors(request, data, answer)


def _sparse_item(_: int, vector: Vector) -> dict[str, Any]:
    return {
        "indices": vector["index"].tolist(),
        "values": vector["value"].copy(),  # orjson takes arrays that lie in one piece
    }


HANDLERS: list[Any] = [embed_sparse, embed_image]
