"""The model lists of all dialects but the native one, and loading and unloading.

The dialects agree about paths and differ in fields, so each answer has the fields of all of them.
"""

from typing import Annotated, Any, Literal

import msgspec
from litestar import get, post
from litestar.params import PathParameter

from embedding_server.api.body import ApiRequest
from embedding_server.api.declared import TAILS, answers
from embedding_server.api.parts import Parts, parts
from embedding_server.catalog import Type
from embedding_server.core import Task
from embedding_server.errors import MethodNotAllowed
from embedding_server.serving.registry import State

_LOAD = "/load"
_SWITCHES = (_LOAD, "/unload")

ModelId = Annotated[str, PathParameter(name="id")]


class ModelCard(msgspec.Struct, kw_only=True):
    """One name of an allowed model; times are unix seconds, `load_time` is in seconds.

    `created` is when this server started. What says when is null while the model is not loaded.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    dimensions: int
    task: Task
    name: str
    type: Type
    loaded: bool
    model_name: str
    is_cached: bool
    load_time: float | None
    loaded_at: float | None
    last_used: float | None


class Models(msgspec.Struct, kw_only=True):
    """Every allowed name, by name, as OpenAI's `data` and as Cohere's and the unified `models`.

    The other lists are the fast embedding API's: what stays loaded, what is loaded, what may be.
    """

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[ModelCard]
    total: int
    required_models: list[str]
    cached_models: list[str]
    allowed_models: list[str]


class Switched(msgspec.Struct):
    """What became of a model."""

    status: Literal["success"]
    message: str
    model_id: str
    loaded: bool


def models(request: ApiRequest) -> Models:
    """The allowed models, by name."""
    here = parts(request)
    registry, allowed = here.engine.registry, here.engine.catalog.allowed
    cards = [_card(here, name) for name in sorted(set().union(*allowed.values()))]
    return Models(
        data=cards,
        models=cards,
        total=len(cards),
        required_models=[one.spec.id for one in registry.pinned],
        cached_models=registry.loaded,
        allowed_models=[card.id for card in cards],
    )


def model(request: ApiRequest, name: ModelId) -> ModelCard:
    """One allowed model."""
    return _card(parts(request), name.removeprefix("/"))  # a path parameter begins with one


async def model_or_switch(request: ApiRequest, name: ModelId) -> ModelCard | Switched:
    """One allowed model; behind its id `/load` works too, but POST it."""
    wanted, here = name.removeprefix("/"), parts(request)
    allowed = any(wanted in names for names in here.engine.catalog.allowed.values())
    if wanted.endswith(_LOAD) and not allowed:
        return await _switched(request, wanted)
    return _card(here, wanted)


async def switch(request: ApiRequest, name: ModelId) -> Switched:
    """Behind the id of an allowed model, `/load` loads it and `/unload` unloads it."""
    return await _switched(request, name.removeprefix("/"))


async def _switched(request: ApiRequest, path: str) -> Switched:
    engine = parts(request).engine
    name, _, action = path.rpartition("/")
    if action == "load":
        await engine.load(name)
    elif action == "unload":
        await engine.unload(name)
    else:
        raise MethodNotAllowed(
            "POST works on /api/v1/models/{id}/load and /unload alone", allow="GET, OPTIONS"
        )
    return Switched("success", f"Model {name} is {action}ed", name, action == "load")


def _card(here: Parts, name: str) -> ModelCard:
    """That of one allowed name: for embedding, if it is allowed for both tasks.

    Raises:
        UnsupportedModel: it is not allowed.
    """
    catalog = here.engine.catalog
    resident = here.engine.registry.residents[catalog.resolve(name, *Task).id]
    task = Task.EMBED if name in catalog.allowed[Task.EMBED] else Task.RERANK
    spec = resident.spec
    ready, since = resident.state is State.READY, here.created - here.started
    return ModelCard(
        id=name,
        created=here.created,
        owned_by=name.rpartition("/")[0] or "local",
        max_model_len=spec.max_tokens,
        dimensions=spec.dimensions,
        task=task,
        name=name,
        type=Type.of(task, spec.kind),
        loaded=ready,
        model_name=name,
        is_cached=ready,
        load_time=round(resident.load_seconds, 3) if ready else None,
        loaded_at=round(since + resident.loaded_at, 3) if ready else None,
        last_used=round(since + resident.used_at, 3) if ready else None,
    )


def _listing(path: str) -> list[Any]:
    """The list at a path, and each of its models below it."""
    below = f"{path}/{{id:path}}"
    return [get(path, sync_to_thread=False)(models), get(below, sync_to_thread=False)(model)]


_BELOW = "/api/v1/models/{id:path}"
_LOADING = {TAILS: ("", _LOAD)}

HANDLERS: list[tuple[str, list[Any]]] = [
    ("openai cohere", _listing("/v1/models")),
    ("openai fast", _listing("/models")),
    (
        "unified",
        [
            get(_BELOW, opt=_LOADING, responses=answers(ModelCard, Switched))(model_or_switch),
            post(_BELOW, status_code=200, opt={TAILS: _SWITCHES})(switch),
        ],
    ),
    ("openai unified", _listing("/api/v1/models")),
]
"""By the dialects that have them; of two for a path and method the first one is taken."""
