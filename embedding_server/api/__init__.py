"""The HTTP face: one module per dialect, and one row per dialect here."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler

from embedding_server.api import (
    cohere,
    docs,
    fast,
    kinds,
    models,
    native,
    openai,
    ops,
    shared,
    tei,
    unified,
)
from embedding_server.api.declared import INFERENCE
from embedding_server.api.errors import Shape
from embedding_server.settings import DIALECTS

ROUTERS: list[tuple[str, list[Any]]] = [
    ("native", native.HANDLERS + kinds.HANDLERS),
    ("openai", openai.HANDLERS),
    ("cohere", cohere.HANDLERS),
    ("tei", tei.HANDLERS),
    ("unified", unified.HANDLERS),
    ("fast", fast.HANDLERS),
    *shared.HANDLERS,
    *models.HANDLERS,
]
"""Handlers, and who has them: any of several dialects, or with `&` all of them together."""
ALWAYS: list[Any] = ops.HANDLERS + docs.HANDLERS
"""What there is whatever the dialects are."""

_SHAPES: dict[str, dict[str, Shape]] = {
    "tei": tei.SHAPES,
    "unified": unified.SHAPES,
    "openai": openai.SHAPES,
    "cohere": cohere.SHAPES,
    "fast": fast.SHAPES,
}
"""Where several dialects have a prefix, the first one's shape is taken."""


class Face(msgspec.Struct, frozen=True):
    """What an application shows: its handlers, the paths of those that run a model, and errors.

    `shapes`: path prefix, in whole segments -> how failures below it are written; the longest wins.
    """

    handlers: list[Any]
    inference_routes: frozenset[str]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, dialects: Collection[str] = DIALECTS) -> "Face":
        """That of these dialects."""
        chosen = [
            handlers
            for names, handlers in ROUTERS
            if any(set(one.split("&")) <= set(dialects) for one in names.split())
        ]
        shown = list(_first_of_each_path(handler for one in chosen for handler in one))
        routes = {path for one in shown if INFERENCE in (one.opt or {}) for path in one.paths}
        shapes = [shapes for name, shapes in _SHAPES.items() if name in dialects]
        merged = {prefix: shape for one in reversed(shapes) for prefix, shape in one.items()}
        handlers = [*_options([*shown, *ALWAYS]), *shown, *ALWAYS]
        return cls(handlers, frozenset(routes), merged)


def _first_of_each_path(handlers: Iterable[Any]) -> Iterator[Any]:
    """The handlers without those whose path and method an earlier one has."""
    seen: set[tuple[str, str]] = set()
    for one in handlers:
        if seen.isdisjoint(ways := set(itertools.product(one.paths, one.http_methods))):
            seen |= ways
            yield one


def _options(handlers: Sequence[Any]) -> Iterator[HTTPRouteHandler]:
    """Answers to OPTIONS for paths of several handlers: Litestar's name the methods of one.

    They have to come first.
    """
    methods: dict[str, list[str]] = {}
    for one in handlers:
        for path in one.paths if isinstance(one, HTTPRouteHandler) else ():
            methods.setdefault(path, []).extend(one.http_methods)
    for path, several in methods.items():
        if len(several) > 1:
            yield _option(path, ", ".join(sorted(["OPTIONS", *several])))


def _option(path: str, allow: str) -> HTTPRouteHandler:
    @route(path, http_method=HttpMethod.OPTIONS, include_in_schema=False, sync_to_thread=False)
    def options() -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allow})

    return options
