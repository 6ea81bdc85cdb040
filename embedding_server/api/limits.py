"""Limits of each client's own, by key or else by address: requests and tokens a minute.

Both are buckets that hold a minute's worth. A request is counted before it is let in, its tokens
when it is over and if they went to be run, whatever became of it: their number is known once they
are tokenised, which nobody is before it is let in, and a guess would refuse who has enough. So a
client may owe tokens, and whoever owes some is refused until they have flowed in.
"""

import math
import time
from collections.abc import Callable, Sequence

from embedding_server.errors import RateLimited

_MOST_CLIENTS = 10_000
"""Who was longest away is forgotten."""
_MINUTE = 60.0


class RateLimit:
    """So many of something a minute and client.

    Args:
        per_minute: 0 = no limit.
        clock: in seconds.
        what: of what.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        what: str = "requests",
    ) -> None:
        self._spacing = _MINUTE / per_minute if per_minute else 0.0
        self.per_minute = per_minute
        self.what = what
        self._clock = clock
        self._full_at: dict[str, float] = {}
        """When a client's bucket will be full again; who came last is last."""

    def __repr__(self) -> str:
        return f"RateLimit({self.per_minute}, clients={len(self._full_at)})"

    def spend(self, client: str) -> None:
        """Count one; raises `RateLimited` where it is one too many."""
        self.check(client)
        self.charge(client, 1)

    def check(self, client: str) -> None:
        """Raise `RateLimited` where there is not one left."""
        if not self._spacing or client not in self._full_at:
            return
        excess = self._full_at[client] - self._clock() + self._spacing - _MINUTE
        if excess > 1e-6:
            message = f"more than {self.per_minute} {self.what} a minute: slow down"
            raise RateLimited(message, retry_after=excess)

    def charge(self, client: str, amount: float) -> None:
        """Count so many, whether or not there are any left."""
        if not self._spacing or not amount:
            return
        now = self._clock()
        full_at = max(now, self._full_at.pop(client, now)) + amount * self._spacing
        self._full_at[client] = full_at
        if len(self._full_at) > _MOST_CLIENTS:
            del self._full_at[next(iter(self._full_at))]

    def left(self, client: str) -> tuple[int, int]:
        """How many there are now, and in how many seconds there is a minute's worth again."""
        missing = self._full_at.get(client, 0.0) - self._clock()
        if missing <= 0:
            return self.per_minute, 0
        left = int(self.per_minute - missing / self._spacing + 1e-6)
        return (left if left > 0 else 0), math.ceil(missing - 1e-6)


class RateLimits:
    """Both limits of every client, and how its answers tell of them."""

    def __init__(self, requests: RateLimit, tokens: RateLimit) -> None:
        self._requests = requests
        self._tokens = tokens
        limits = [one for one in (requests, tokens) if one.per_minute]
        self._set = [(one, f'"{one.what}";r='.encode()) for one in limits]
        self._policy = (b"ratelimit-policy", ", ".join(map(_policy, limits)).encode())

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return bool(self._set)

    def __repr__(self) -> str:
        return f"RateLimits({self._requests}, {self._tokens})"

    def spend(self, client: str) -> None:
        """Count a request; raises `RateLimited`."""
        self._tokens.check(client)
        self._requests.spend(client)

    def charge(self, client: str, tokens: int) -> None:
        """Count the tokens of a request that went to be run."""
        self._tokens.charge(client, tokens)

    def headers(self, client: str) -> Sequence[tuple[bytes, bytes]]:
        """Answer headers: what is left of both, and of the one of which less is left.

        `RateLimit-Policy` and `RateLimit` are those of draft-ietf-httpapi-ratelimit-headers-11, the
        others those of its first six versions, which more clients read.
        """
        least, now = (2.0, 0, 0, 0), []
        for one, start in self._set:
            left, seconds = one.left(client)
            now.append(b"%s%d;t=%d" % (start, left, seconds))
            least = min(least, (left / one.per_minute, one.per_minute, left, seconds))
        _, limit, left, seconds = least
        return (
            self._policy,
            (b"ratelimit", b", ".join(now)),
            (b"ratelimit-limit", b"%d" % limit),
            (b"ratelimit-remaining", b"%d" % left),
            (b"ratelimit-reset", b"%d" % seconds),
        )


def _policy(limit: RateLimit) -> str:
    unit = "" if limit.what == "requests" else f';qu="{limit.what}"'
    return f'"{limit.what}";q={limit.per_minute};w={_MINUTE:.0f}{unit}'
