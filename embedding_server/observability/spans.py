"""A span that has ended, as little as says it all.

The SDK's own, its queue and its encoder take three times as long, and a tenth of a small machine's
throughput (`benchmarks/telemetry.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

Attributes = Mapping[str, str | int | float | bool]


class Ids(NamedTuple):
    """What others call a span."""

    trace: int
    span: int


class Span(NamedTuple):
    """Something that has ended; `began` and `ended` are nanoseconds since 1970.

    `parent` is of the same trace, 0 where there is none, and with `is_server` the client's.
    `error` describes an error's status, empty where the status is unset.
    """

    own: Ids
    parent: int
    name: str
    began: int
    ended: int
    attributes: Attributes = MappingProxyType({})
    links: Sequence[Ids] = ()
    is_server: bool = False
    error: str = ""
