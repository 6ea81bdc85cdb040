"""Fair shares between clients: who of those that wait goes next."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Shares(Generic[K]):
    """What everyone who waits has had; whoever has had least goes next.

    This is fair queueing by virtual time, which deficit round robin approximates: of two that
    always have something waiting, neither gets more than one turn ahead. Who comes anew starts
    level with the one that is next, so nobody saves up while away; who left with more than that
    comes back with it, so nobody sheds it by leaving.
    """

    def __init__(self) -> None:
        self._had: dict[K, float] = {}
        self._away: dict[K, float] = {}
        """Those who left ahead of the level."""
        self._level = 0.0

    @property
    def next(self) -> K:
        """Whose turn it is; somebody must wait."""
        return min(self._had, key=self._had.__getitem__)

    def join(self, key: K) -> None:
        """Somebody waits from now on, or already does."""
        if key not in self._had:
            self._raise_level()
            self._had[key] = max(self._level, self._away.pop(key, 0.0))

    def leave(self, key: K) -> None:
        """Nothing of theirs waits any more."""
        self._raise_level()
        self._away[key] = self._had.pop(key)
        self._away = {one: had for one, had in self._away.items() if had > self._level}

    def charge(self, key: K, amount: float) -> None:
        """They have had so much more."""
        self._had[key] += amount

    def in_turn(self, keys: Iterable[K], key: K, lead: float) -> list[K]:
        """Those who wait and have had at most so much more than `key`, who had least first."""
        most = self._had[key] + lead
        return sorted((one for one in keys if self._had[one] <= most), key=self._had.__getitem__)

    def _raise_level(self) -> None:
        self._level = max(self._level, min(self._had.values(), default=self._level))
