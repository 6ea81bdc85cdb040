"""Paths that several dialects have: the body says which of them is meant, or the answer is a union.

This module and `models` alone know several dialects.
"""

from typing import Any, ClassVar

import msgspec
from litestar import get, post
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from embedding_server import __version__
from embedding_server.api import fast, openai, tei
from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import HEADERS, INFERENCE, MODEL, SHAPES, answers, any_of
from embedding_server.api.errors import SHAPE
from embedding_server.api.inference import Inputs
from embedding_server.api.parts import parts
from embedding_server.core import Kind, ModelSpec, Precision, Task
from embedding_server.errors import BadRequest
from embedding_server.serving.options import ONE_VECTOR
from embedding_server.serving.registry import Resident


class EmbedRequest(tei.VectorOptions, kw_only=True, frozen=True):
    """TEI's with `inputs`, or the fast embedding API's with `model_name` and `text`."""

    examples: ClassVar = [
        {"inputs": ["a cat", "a dog"]},
        {"model_name": MODEL, "text": "a cat"},
    ]
    rule: ClassVar = any_of(("inputs",), ("model_name", "text"))

    inputs: Inputs | None = None
    model_name: str | None = None
    text: str | None = None


@post(
    "/embed",
    status_code=200,
    opt={INFERENCE: Task.EMBED, HEADERS: tei.TIMES, SHAPES: (tei.tei_error, fast.fast_error)},
    responses=answers(list[list[float]], fast.EmbedAnswer),
)
async def embed(request: ApiRequest, data: JSONBody[EmbedRequest]) -> ASGIResponse:
    """One vector per text."""
    if data.inputs is not None:
        return await tei.embed(request, data.inputs, data.options(request), ONE_VECTOR)
    if data.model_name is None:
        raise BadRequest("give inputs, or model_name and text")
    request.scope["state"][SHAPE] = fast.fast_error
    if data.text is None:
        raise BadRequest("give model_name and text")
    return await fast.embed(request, data.model_name, data.text)


class ApiInfo(msgspec.Struct):
    """What serves."""

    name: str
    version: str


class ModelsInfo(msgspec.Struct):
    """How many models there are."""

    total: int
    loaded: int
    preload_complete: bool
    loaded_models: list[str]


class Info(msgspec.Struct):
    """TEI's fields, of the model of requests that name none, and the unified API's.

    Those of the model are null where there is no such model.
    """

    model_id: str | None
    model_sha: str | None
    model_dtype: str | None
    model_type: dict[str, dict[str, Any]] | None
    max_input_length: int | None
    max_concurrent_requests: int
    max_batch_tokens: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    api: ApiInfo
    models: ModelsInfo


@get("/info", sync_to_thread=False)
def info(request: ApiRequest) -> Info:
    """What this is and what it serves."""
    here = parts(request)
    settings, registry = here.settings, here.engine.registry
    resident = _default(request)
    spec = resident.spec if resident else None
    model = resident.model if resident else None
    return Info(
        model_id=spec.id if spec else None,
        model_sha=spec.origin.revision if spec and spec.origin else None,
        model_dtype=_DTYPES[model.precision] if model else None,
        model_type=_model_type(spec) if spec else None,
        max_input_length=spec.max_tokens if spec else None,
        max_concurrent_requests=settings.max_concurrent_requests or settings.max_queue_depth,
        max_batch_tokens=settings.max_batch_tokens,
        max_client_batch_size=max(tei.MAX_INPUTS, settings.max_batch_size),
        auto_truncate=True,
        tokenization_workers=1,
        version=__version__,
        api=ApiInfo("embedding-server", __version__),
        models=ModelsInfo(
            total=len(registry.residents),
            loaded=len(registry.loaded),
            preload_complete=here.readiness.check().started,
            loaded_models=registry.loaded,
        ),
    )


_DTYPES = {
    Precision.FP32: "float32",
    Precision.TF32: "float32",
    Precision.FP16: "float16",
    Precision.BF16: "bfloat16",
    Precision.INT8: "int8",
}


def _default(request: ApiRequest) -> Resident | None:
    """The model of requests that name none."""
    try:
        return parts(request).engine.registry.residents[tei.any_model(request)]
    except BadRequest:
        return None


def _model_type(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    if spec.kind is Kind.CROSS:
        return {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    return {"embedding": {"pooling": str(spec.pooling)}}


HANDLERS: list[tuple[str, list[Any]]] = [
    ("tei&fast", [embed]),
    ("tei", [tei.embed_alone]),
    ("fast", [fast.embed_alone]),
    ("tei unified", [info]),
    ("openai unified", [openai.embeddings_at("/api/v1/embeddings")]),
]
"""By the dialects that have them; of two for a path and method the first one is taken."""
