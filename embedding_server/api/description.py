"""The OpenAPI document, read off the handlers: nothing about a route is said twice.

Schemas are msgspec's, of the very types that requests are decoded to and answers are made of;
`routes` has the rest.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Litestar

from embedding_server import __version__
from embedding_server.api.declared import HEADERS, INFERENCE, MODEL, JsonSchema
from embedding_server.api.errors import Shape
from embedding_server.api.inference import MAX_TIMEOUT_MS
from embedding_server.api.parts import Parts
from embedding_server.api.routes import JSON, Route, routes_of

_PACKAGE = "embedding_server.api."
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
    "RateLimit-Policy": (_TEXT, "the client's limits, where it has any"),
    "RateLimit": (_TEXT, "what is left of each, and when it is whole again"),
    "RateLimit-Limit": (_COUNT, "a minute, of the limit of which least is left"),
    "RateLimit-Remaining": (_COUNT, "what is left of it"),
    "RateLimit-Reset": (_COUNT, "seconds until it is whole again"),
    "WWW-Authenticate": ({"const": "Bearer"}, "what is missing"),
    "Allow": (_TEXT, "the methods that work"),
}
SHOWN = [*_HEADERS]
"""Headers of answers that pages of other origins may read."""

_SOMETIMES = {"X-Truncated-Inputs"}
_OF_EVERY = ("X-Request-Id",)
_OF_QUEUED = ("X-Queue-Depth", "X-Queue-Capacity", "X-Estimated-Wait-Ms")
_OF_INFERRED = ("X-Model-Fingerprint", "X-Truncated-Inputs")
_RETRY = ("Retry-After", "retry-after-ms")
_LIMITS = tuple(name for name in _HEADERS if name.startswith("RateLimit"))
_OF_FAILED = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: _RETRY, 503: _RETRY}
_MODEL_FIELDS = {"model", "model_name"}
_KEYS = {
    "key": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "the request's own deadline, then 504",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
}


def document(app: Litestar, shapes: Mapping[str, Shape], here: Parts) -> JsonSchema:
    """The document of an application, as its models and settings are.

    `shapes` are those of failures by path prefix.
    """
    routes = list(routes_of(app, shapes))
    types = list(dict.fromkeys(one for route in routes for one in route.types()))
    made = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    # Where several types have one name, msgspec says where each comes from.
    schemas, components = json.loads(json.dumps(made).replace(_PACKAGE, ""))
    known = dict(zip(types, schemas, strict=True))
    limited = bool(here.settings.rate_limit or here.settings.rate_limit_tokens)
    paths: dict[str, JsonSchema] = {}
    for route in routes:
        operation = _operation(route, known, limited=limited and route.method == "post")
        if route.data:
            component = components[known[route.data]["$ref"].rpartition("/")[2]]
            operation["requestBody"] = _request_body(route, component, here)
        if here.settings.api_keys and route.keyed:
            operation["security"] = [{name: []} for name in _KEYS]
        paths.setdefault(route.path + route.tail, {})[route.method] = operation
        if route.named:
            operation["parameters"].append(_model_parameter(route.models(here)))
    for used in {known[route.data]["$ref"] for route in routes if route.data}:
        del components[used.rpartition("/")[2]]  # each operation has its own
    keys = _KEYS if here.settings.api_keys else {}
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


def _operation(route: Route, known: Mapping[Any, JsonSchema], *, limited: bool) -> JsonSchema:
    runs = bool(route.option(INFERENCE))
    common = [*_OF_EVERY, *(_OF_QUEUED if runs else ()), *(_LIMITS if limited else ())]
    own = {
        name: {"schema": _COUNT, "description": words}
        for name, words in route.option(HEADERS, {}).items()
    }
    responses = {
        status: {
            "description": words,
            "headers": _headers(*common, *_OF_FAILED.get(status, ())),
            "content": _content({JSON: bodies}, known),
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
        if (names if MODEL in example.values() else route.has_default(here))
    ]
    examples = {f"example {index}": {"value": one} for index, one in enumerate(shown, 1)}
    return {"required": True, "content": {JSON: {"schema": body, "examples": examples}}}
