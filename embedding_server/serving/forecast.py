"""When work will be done: how fast it drains, and who was told to come back when."""

import math
import time
from collections import defaultdict

_MEMORY_SECONDS = 5.0
_PRIOR_SECONDS = 1.0


class Drain:
    """Work that leaves per second while somebody waits, over the last seconds.

    It counts work as it was predicted, so that a prediction that is wrong all the time cancels out.

    Args:
        rate: what is assumed before anything was seen.
    """

    def __init__(self, rate: float) -> None:
        self._work, self._seconds = rate * _PRIOR_SECONDS, _PRIOR_SECONDS
        self._since: float | None = None

    @property
    def rate(self) -> float:
        """Seconds of predicted work per second."""
        return self._work / self._seconds

    def begin(self) -> None:
        """Somebody waits from now on; what leaves next was begun before, and does not count."""
        self._since = None

    def left(self, work: float) -> None:
        """So much has left since the last time, while somebody waited."""
        now = time.monotonic()
        since, self._since = self._since, now
        if since is None:
            return
        passed = now - since
        kept = math.exp(-passed / _MEMORY_SECONDS)
        self._work = kept * self._work + work
        self._seconds = kept * self._seconds + passed


class Promises:
    """Work that was refused and told when to come back, by the second it is due in."""

    def __init__(self) -> None:
        self._due: defaultdict[int, float] = defaultdict(float)

    @property
    def work(self) -> float:
        """What is still to come back."""
        now = int(time.monotonic())
        for second in [second for second in self._due if second < now]:
            del self._due[second]
        return sum(self._due.values())

    def add(self, work: float, seconds: float) -> None:
        """So much work was told to come back in so many seconds."""
        self._due[int(time.monotonic() + seconds)] += work
