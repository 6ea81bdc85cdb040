"""What handlers and requests declare about themselves, beside their types.

The guard and the OpenAPI document go by it. Handlers declare options and `answers`; the struct of a
request has `examples`, and a `rule` where some of its optional fields have to be there.
"""

from typing import Any

from litestar.openapi.datastructures import ResponseSpec

INFERENCE = "inference"
"""Handler option: the task that the route runs a model for, so that admission concerns it."""
KINDS = "kinds"
"""Handler option: the kinds of models that embed here, where they are not `ONE_VECTOR`."""
SHAPES = "shapes"
"""Handler option: the shapes of failures, where the body and not the path decides."""
HEADERS = "headers"
"""Handler option: more headers that an answer may have, with their meaning; all are numbers."""
TAILS = "tails"
"""Handler option: what may follow the path, where a parameter takes it all."""
FORMATS = "formats"
"""Handler option: the answer's type by media type, where there are several."""

MODEL = "<model>"
"""In examples: a model that this server has for the route."""

JsonSchema = dict[str, Any]

_TYPES = ["string", "array", "object"]


def answers(*bodies: Any, status: int = 200, description: str = "done") -> dict[int, ResponseSpec]:
    """What an answer's body may be."""
    one_of: Any = bodies
    return {status: ResponseSpec(one_of, generate_examples=False, description=description)}


def exactly_one(*fields: str) -> JsonSchema:
    """The rule that one of these fields is given."""
    return {"oneOf": [_given(field) for field in fields]}


def at_most_one(first: str, second: str) -> JsonSchema:
    """The rule that not both of these fields are given."""
    return {"not": _given(first, second)}


def any_of(*groups: tuple[str, ...]) -> JsonSchema:
    """The rule that all fields of one of these groups are given."""
    return {"anyOf": [_given(*group) for group in groups]}


def _given(*fields: str) -> JsonSchema:
    return {"required": list(fields), "properties": {field: {"type": _TYPES} for field in fields}}
