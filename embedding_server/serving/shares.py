"""Fair shares between clients: who of those that wait goes next."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Shares(Generic[K]):
    """What everyone who waits has had; whoever has had least goes next.

    This is what deficit round robin comes to, without its quantum: of two that wait at the same
    time, neither gets more than one turn ahead. Who comes anew starts level with the one that is
    next: nobody saves up while away.
    """

    def __init__(self) -> None:
        self._had: dict[K, float] = {}

    def __bool__(self) -> bool:
        return bool(self._had)

    @property
    def next(self) -> K:
        """Whose turn it is; somebody must wait."""
        return min(self._had, key=self._had.__getitem__)

    def join(self, key: K) -> None:
        """Somebody waits from now on, or already does."""
        if key not in self._had:
            self._had[key] = min(self._had.values(), default=0.0)

    def leave(self, key: K) -> None:
        """Nothing of theirs waits any more."""
        del self._had[key]

    def charge(self, key: K, amount: float) -> None:
        """They have had so much more."""
        self._had[key] += amount

    def in_turn(self, keys: Iterable[K]) -> list[K]:
        """Some of those who wait, whoever has had least first."""
        return sorted(keys, key=self._had.__getitem__)
