"""What handlers need of the application, typed."""

from typing import Any

import msgspec
from litestar import Request

from embedding_server.observability.metrics import Metrics
from embedding_server.serving.device import Device
from embedding_server.serving.engine import Engine
from embedding_server.serving.readiness import Readiness
from embedding_server.settings import Settings


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of one application.

    `started` is `time.monotonic()` at creation, `created` the same moment in unix seconds.
    """

    settings: Settings
    metrics: Metrics
    device: Device
    engine: Engine
    readiness: Readiness
    started: float
    created: int


def parts(request: Request[Any, Any, Any]) -> Parts:
    """The parts of the application that serves `request`."""
    found: Parts = request.app.state["parts"]
    return found
