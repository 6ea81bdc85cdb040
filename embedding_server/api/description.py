"""The OpenAPI document, read off the handlers: nothing about a route is said twice.

Schemas are msgspec's, of the very types that requests are decoded to and answers are made of. A
route's failures follow from what it is and have the shapes that they are answered in; the models it
takes are those that this server has for it. The rest is `declared`.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from litestar import Litestar
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from embedding_server import __version__
from embedding_server.api.declared import (
    FORMATS,
    HEADERS,
    INFERENCE,
    KINDS,
    MODEL,
    SHAPES,
    TAILS,
    JsonSchema,
)
from embedding_server.api.errors import Shape, failures, shape_of
from embedding_server.api.inference import MAX_TIMEOUT_MS
from embedding_server.api.middleware import OPERATIONS
from embedding_server.api.parts import Parts
from embedding_server.core import Kind, Task
from embedding_server.errors import BadRequest
from embedding_server.serving.options import ONE_VECTOR

_JSON, _PACKAGE = "application/json", "embedding_server.api."
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_HEADERS: Mapping[str, tuple[JsonSchema, str]] = {
    "X-Request-Id": (_TEXT, "the client's own, or a new one"),
    "X-Queue-Depth": (_COUNT, "requests that wait"),
    "X-Queue-Capacity": (_COUNT, "most requests that may wait"),
    "X-Estimated-Wait-Ms": (_COUNT, "of a request that came now"),
    "X-Model-Fingerprint": (_TEXT, "as long as it stays, vectors do"),
    "X-Truncated-Inputs": (_COUNT, "texts that were cut, where some were"),
    "Retry-After": (_COUNT, "seconds"),
    "retry-after-ms": (_COUNT, "the same in milliseconds"),
    "WWW-Authenticate": ({"const": "Bearer"}, "what is missing"),
    "Allow": (_TEXT, "the methods that work"),
}
SHOWN = [*_HEADERS]
"""Headers of answers that pages of other origins may read."""

_SOMETIMES = "X-Truncated-Inputs"
_OF_EVERY = ("X-Request-Id",)
_OF_QUEUED = ("X-Queue-Depth", "X-Queue-Capacity", "X-Estimated-Wait-Ms")
_OF_INFERRED = ("X-Model-Fingerprint", "X-Truncated-Inputs")
_RETRY = ("Retry-After", "retry-after-ms")
_OF_FAILED = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: _RETRY, 503: _RETRY}
_MODEL_FIELDS = {"model", "model_name"}
_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "the request's own deadline, then 504",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
}


class Route(msgspec.Struct, frozen=True):
    """A path and method; `tail` is the path's end, where it has one behind a parameter."""

    path: str
    tail: str
    method: str
    handler: HTTPRouteHandler
    shapes: Sequence[Shape]

    def option(self, key: str, default: Any = None) -> Any:
        """What the handler declares under `key`."""
        return (self.handler.opt or {}).get(key, default)

    @property
    def data(self) -> Any:
        """The type of the request's body, or None."""
        field = self.handler.parsed_data_field
        return field.annotation if field else None

    @property
    def named(self) -> bool:
        """Whether the path names a model."""
        return "{" in self.path

    @property
    def keyed(self) -> bool:
        """Whether it wants a key, if the server has keys."""
        return not self.path.startswith(OPERATIONS)

    @property
    def failures(self) -> dict[int, tuple[str, tuple[Any, ...]]]:
        """Words and the types of bodies, by status."""
        acts = self.method == "post" or bool(self.tail)
        return failures(self.shapes, acts=acts, named=self.named, keyed=self.keyed)

    @property
    def successes(self) -> dict[int, tuple[str, dict[str, tuple[Any, ...]]]]:
        """What the handler itself answers: words, and the types of bodies by media type."""
        returned = self.handler.parsed_fn_signature.return_type.annotation
        formats = self.option(FORMATS, {_JSON: returned})
        declared: dict[int, tuple[str, dict[str, Any]]] = {
            status: (str(spec.description), {_JSON: spec.data_container})
            for status, spec in (self.handler.responses or {}).items()
        }
        return declared or {200: ("done", {media: (body,) for media, body in formats.items()})}

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of models that serve it, the most usual one first."""
        embeds = self.option(INFERENCE) is Task.EMBED
        found: tuple[Kind, ...] = self.option(KINDS, ONE_VECTOR if embeds else tuple(Kind))
        return found

    def types(self) -> Iterator[Any]:
        """All types of bodies, either way."""
        if self.data:
            yield self.data
        for _, formats in self.successes.values():
            yield from itertools.chain(*formats.values())
        for _, bodies in self.failures.values():
            yield from bodies

    def models(self, here: Parts) -> list[str]:
        """The names of models that it serves."""
        listed, residents = here.engine.catalog.listed, here.engine.registry.residents
        task, images = self.option(INFERENCE), Kind.IMAGE in self.option(KINDS, ())
        specs = {
            name: residents[spec.id].spec
            for one in ([task] if task else Task)
            for spec in listed[one].values()
            for name in spec.names
        }
        return [
            name
            for kind in self.kinds
            for name, spec in specs.items()
            if spec.kind is kind and (kind is not Kind.MULTI or spec.takes_images or not images)
        ]


def document(app: Litestar, shapes: Mapping[str, Shape], here: Parts) -> JsonSchema:
    """The document of an application, as its models and settings are.

    `shapes` are those of failures by path prefix.
    """
    routes = list(_routes(app, shapes))
    types = list(dict.fromkeys(one for route in routes for one in route.types()))
    made = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    # Where several types have one name, msgspec says where each comes from.
    schemas, components = json.loads(json.dumps(made).replace(_PACKAGE, ""))
    known = dict(zip(types, schemas, strict=True))
    paths: dict[str, JsonSchema] = {}
    for route in routes:
        operation = _operation(route, known)
        if route.data:
            component = components[known[route.data]["$ref"].rpartition("/")[2]]
            operation["requestBody"] = _request_body(route, component, here)
        if here.settings.api_keys and route.keyed:
            operation["security"] = [{"key": []}]
        paths.setdefault(route.path + route.tail, {})[route.method] = operation
        if route.named:
            operation["parameters"].append(_model_parameter(route.models(here)))
    for used in {known[route.data]["$ref"] for route in routes if route.data}:
        del components[used.rpartition("/")[2]]  # each operation has its own
    keys = {"key": {"type": "http", "scheme": "bearer"}} if here.settings.api_keys else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedding-server",
            "version": __version__,
            "description": "Embeddings and reranking over HTTP.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": {
                name: {"schema": schema, "description": words, "required": name not in _SOMETIMES}
                for name, (schema, words) in _HEADERS.items()
            },
            "securitySchemes": keys,
        },
    }


def _routes(app: Litestar, shapes: Mapping[str, Shape]) -> Iterator[Route]:
    for route in app.routes:
        if not isinstance(route, HTTPRoute):
            continue
        path = route.path_format or "/"
        for handler in route.route_handlers:
            if not handler.resolve_include_in_schema():
                continue
            said = handler.opt or {}
            ways = itertools.product(said.get(TAILS, [""]), sorted(handler.http_methods))
            for tail, method in ways:
                if method != HttpMethod.OPTIONS:
                    spoken = said.get(SHAPES, [shape_of(shapes, path)])
                    yield Route(path, tail, method.lower(), handler, spoken)


def _operation(route: Route, known: Mapping[Any, JsonSchema]) -> JsonSchema:
    runs = bool(route.option(INFERENCE))
    common = [*_OF_EVERY, *(_OF_QUEUED if runs else ())]
    own = {
        name: {"schema": _COUNT, "description": words}
        for name, words in route.option(HEADERS, {}).items()
    }
    responses = {
        status: {
            "description": words,
            "headers": _headers(*common, *_OF_FAILED.get(status, ())),
            "content": _content({_JSON: bodies}, known),
        }
        for status, (words, bodies) in route.failures.items()
    }
    for status, (words, formats) in route.successes.items():
        responses[status] = {
            "description": words,
            "headers": _headers(*common, *(_OF_INFERRED if runs else ())) | own,
            "content": _content(formats, known),
        }
    name = f"{route.method}{route.path}{route.tail}"
    return {
        "operationId": re.sub(r"\W+", "_", name).strip("_"),
        "tags": [route.handler.fn.__module__.removeprefix(_PACKAGE).partition(".")[0]],
        "summary": (route.handler.fn.__doc__ or "").partition("\n")[0],
        "deprecated": bool(route.tail) and route.method == "get",
        "parameters": [_TIMEOUT] if runs else [],
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }


def _headers(*names: str) -> JsonSchema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _content(
    formats: Mapping[str, tuple[Any, ...]], known: Mapping[Any, JsonSchema]
) -> dict[str, JsonSchema]:
    return {
        media: {
            "schema": known[types[0]] if len(types) == 1 else {"anyOf": [*map(known.get, types)]}
        }
        for media, types in formats.items()
    }


def _model_parameter(names: list[str]) -> JsonSchema:
    return {"name": "id", "in": "path", "required": True, "schema": {"enum": names}}


def _request_body(route: Route, schema: JsonSchema, here: Parts) -> JsonSchema:
    """The body of the struct's `schema` with the models that the route has, and examples."""
    names, fields = route.models(here), dict(schema["properties"])
    for field in _MODEL_FIELDS & fields.keys() if names else ():
        fields[field] = {"enum": names if field in schema["required"] else [*names, None]}
    body = {**schema, "properties": fields, **getattr(route.data, "rule", {})}
    shown = [
        {key: names[0] if value is MODEL else value for key, value in example.items()}
        for example in route.data.examples
        if (names if MODEL in example.values() else _has_default(route, here))
    ]
    examples = {f"example {index}": {"value": one} for index, one in enumerate(shown, 1)}
    return {"required": True, "content": {_JSON: {"schema": body, "examples": examples}}}


def _has_default(route: Route, here: Parts) -> bool:
    """Whether the server knows the model of requests that name none."""
    try:
        here.engine.default(route.option(INFERENCE, Task.EMBED), route.kinds)
    except BadRequest:
        return False
    return True
