"""Limits of each client's own: how many requests a minute, by key or else by address."""

import time
from collections.abc import Callable

from embedding_server.errors import RateLimited

_MOST_CLIENTS = 10_000
"""Who was longest away is forgotten."""
_MINUTE = 60.0


class RateLimit:
    """So many requests a minute and client, as a bucket that holds a minute's worth of them.

    Args:
        per_minute: 0 = no limit.
        clock: in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._spacing = _MINUTE / per_minute if per_minute else 0.0
        self._per_minute = per_minute
        self._clock = clock
        self._full_at: dict[str, float] = {}
        """When a client's bucket will be full again; who came last is last."""

    def __repr__(self) -> str:
        return f"RateLimit({self._per_minute}, clients={len(self._full_at)})"

    def spend(self, client: str) -> None:
        """Count a request; raises `RateLimited` where it is one too many."""
        if not self._spacing:
            return
        now = self._clock()
        full_at = max(now, self._full_at.pop(client, now)) + self._spacing
        if (excess := full_at - now - _MINUTE) > 1e-6:
            self._full_at[client] = full_at - self._spacing
            message = f"more than {self._per_minute} requests a minute: slow down"
            raise RateLimited(message, retry_after=excess)
        self._full_at[client] = full_at
        if len(self._full_at) > _MOST_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
