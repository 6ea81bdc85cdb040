"""Replicas behind a balancer, second by second: what waits, what is refused, when it comes back.

Work is a fluid, in seconds of one replica. The rules are the server's (`serving/admission.py`):
two lanes with limits of their own, small requests first but for a quarter of the time; who would
wait longer than four fifths of the timeout is refused at once; `Retry-After` is when all that is
here, and all that was told to come back, will be done. Balancing is perfect: that is nginx's
`least_conn`, not a Service's choice of connections.
"""

from collections import defaultdict, deque
from typing import NamedTuple

import msgspec

from embedding_server.errors import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS
from embedding_server.serving.admission import _CAUTION, _JITTER, _LATE
from embedding_server.settings import Settings

DEFAULTS = Settings(allowed_embedding_models=("any",))
PATIENCE = _CAUTION * DEFAULTS.queue_timeout_ms / 1000 / _LATE
"""Seconds of waiting that the server lets a request in for."""
BULK_SHARE = 0.25
"""While bulk waits, at most three batches in a row pass it by."""
TRIES = 3
"""Clients give up a request that was refused so often."""


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica carries."""

    singles: float
    """Requests of one text per second."""
    bulk: float
    """Requests of 32 texts per second."""
    inside: float
    """Seconds of work of a lane that are admitted; the rest waits in line."""
    refusal: float
    """Seconds that a refusal costs."""


class Second(NamedTuple):
    """What happened in one second."""

    ready: int
    waits: tuple[tuple[float, float], ...]
    """Seconds in line and how many requests, per lane."""
    refused: float
    given_up: float
    answered: float
    """Requests of one text."""
    bulk: float
    """Requests of 32 texts, answered."""
    busy: float
    fill: float
    """How full the line is."""


class Lane:
    """Work of one kind: single texts or bulk."""

    def __init__(self, rate: float, inside: float) -> None:
        self.seconds_each = 1 / rate
        self.work = 0.0
        self.drained = 1.0
        """Work per second and replica that left lately while somebody waited."""
        self._inside = inside

    def wait(self, ready: int) -> float:
        """Seconds that the next request stands in line."""
        return max(0.0, self.work / ready - self._inside) / max(self.drained, 1e-3)

    def room(self, ready: int, available: float) -> float:
        """Requests that are let in during a second in which so much work can be done."""
        line = min(PATIENCE * self.drained, DEFAULTS.max_queue_depth * self.seconds_each)
        most = (line + self._inside) * ready + available
        return max(0.0, most - self.work) / self.seconds_each

    def drain(self, available: float, ready: int) -> float:
        """Do work, as much as there is; returns the seconds it took."""
        done = min(self.work, available)
        if self.work > self._inside * ready:
            self.drained += 0.2 * (done / ready - self.drained)
        self.work -= done
        return done


class Fleet:
    """All replicas.

    Args:
        rates: what one carries.
        replicas: ready ones at the start.
        start_seconds: from the decision for one more until it is ready.
    """

    def __init__(self, rates: Rates, replicas: int, start_seconds: int) -> None:
        self.ready, self._start_seconds = replicas, start_seconds
        self._refusal, self._refused = rates.refusal, 0.0
        self._starting: deque[int] = deque()
        self._singles, self._bulk = (
            Lane(rate, rates.inside) for rate in (rates.singles, rates.bulk)
        )
        self._back: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * TRIES)
        self._promised = 0.0

    @property
    def replicas(self) -> int:
        """Those that serve and those that start."""
        return self.ready + len(self._starting)

    def scale(self, now: int, wanted: int) -> None:
        """Start replicas, or end the youngest; what they have begun they finish."""
        for _ in range(wanted - self.replicas):
            self._starting.append(now + self._start_seconds)
        for _ in range(self.replicas - wanted):
            if self._starting:
                self._starting.pop()
            else:
                self.ready -= 1

    def second(self, now: int, singles: float, bulk: float) -> tuple[Second, float]:
        """One second with so many new requests; and the requests of bulk that were refused."""
        while self._starting and self._starting[0] <= now:
            self._starting.popleft()
            self.ready += 1
        ready = self.ready
        able = max(0.0, ready - self._refused * self._refusal)
        due = self._back.pop(now, [0.0] * TRIES)
        self._promised -= sum(due) * self._singles.seconds_each
        kept = min(self._bulk.work + bulk * self._bulk.seconds_each, BULK_SHARE * able)
        arrived = [singles + due[0], *due[1:]]
        refused = self._admit(now, arrived, able - kept)
        first = self._singles.drain(able - kept, ready)
        let_in = min(bulk, self._bulk.room(ready, able - first))
        self._bulk.work += let_in * self._bulk.seconds_each
        second = self._bulk.drain(able - first, ready)
        self._refused = sum(refused) + bulk - let_in
        waits = (
            (self._singles.wait(ready), sum(arrived) - sum(refused)),
            (self._bulk.wait(ready), let_in),
        )
        done = Second(
            ready=ready,
            waits=waits,
            refused=self._refused,
            given_up=refused[-1],
            answered=first / self._singles.seconds_each,
            bulk=second / self._bulk.seconds_each,
            busy=(first + second + ready - able) / ready,
            fill=self._fill(ready),
        )
        return done, bulk - let_in

    def _admit(self, now: int, arrived: list[float], available: float) -> list[float]:
        """Let in what there is room for, old and new alike; returns the refused, by their tries."""
        total = sum(arrived)
        share = min(1.0, self._singles.room(self.ready, available) / total) if total else 1.0
        self._singles.work += share * total * self._singles.seconds_each
        refused = [(1 - share) * one for one in arrived]
        if share < 1:
            here = self._singles.work + self._bulk.work + self._promised
            after = here / self.ready
            first = now + round(min(max(after, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS / _JITTER))
            last = max(first + 1, now + round((first - now) * _JITTER))
            for second in range(first, last):
                for tries, count in enumerate(refused[:-1]):
                    self._back[second][tries + 1] += count / (last - first)
            self._promised += sum(refused[:-1]) * self._singles.seconds_each
        return refused

    def _fill(self, ready: int) -> float:
        waiting = sum(
            lane.wait(ready) * lane.drained / lane.seconds_each
            for lane in (self._singles, self._bulk)
        )
        return waiting / DEFAULTS.max_queue_depth
