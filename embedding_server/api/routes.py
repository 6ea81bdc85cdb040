"""The routes of an application as its OpenAPI document has them: a path, a method, what they take.

A route's failures follow from what it is and have the shapes that they are answered in; the models
it takes are those that this server has for it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from litestar import Litestar
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from embedding_server.api.declared import FORMATS, INFERENCE, KINDS, SHAPES, TAILS
from embedding_server.api.errors import Shape, failures, shape_of
from embedding_server.api.middleware import OPERATIONS
from embedding_server.api.parts import Parts
from embedding_server.core import Kind, Task
from embedding_server.errors import BadRequest
from embedding_server.serving.options import ONE_VECTOR

JSON = "application/json"


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
        formats = self.option(FORMATS, {JSON: returned})
        declared: dict[int, tuple[str, dict[str, Any]]] = {
            status: (str(spec.description), {JSON: spec.data_container})
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
        allowed, residents = here.engine.catalog.allowed, here.engine.registry.residents
        task, images = self.option(INFERENCE), Kind.IMAGE in self.option(KINDS, ())
        specs = {
            name: residents[spec.id].spec
            for one in ([task] if task else Task)
            for name, spec in allowed[one].items()
        }
        return [
            name
            for kind in self.kinds
            for name, spec in specs.items()
            if spec.kind is kind and (kind is not Kind.MULTI or spec.takes_images or not images)
        ]

    def has_default(self, here: Parts) -> bool:
        """Whether the server knows the model of requests that name none."""
        try:
            here.engine.default(self.option(INFERENCE, Task.EMBED), self.kinds)
        except BadRequest:
            return False
        return True


def routes_of(app: Litestar, shapes: Mapping[str, Shape]) -> Iterator[Route]:
    """All that handlers want to be in the document."""
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
