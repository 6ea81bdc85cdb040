"""How far a conversion is, for whoever waits for it."""

import time
from collections.abc import Callable

import structlog

Progress = Callable[[float], None]
"""Told again and again what share of the weights is read, 0 to 1; 8 bits take several passes."""

_SECONDS = 1.0

log = structlog.get_logger()


class Logged:
    """A `Progress` that writes to the log every second."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, share: float) -> None:
        """See `Progress`."""
        if time.monotonic() - self._shown > _SECONDS:
            self._shown = time.monotonic()
            log.info("graph.building", percent=round(100 * share))
