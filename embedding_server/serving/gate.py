"""One lane of the gate before the model: who is inside and who waits, as numbers and work.

Waiting clients take turns; each one's requests go first come first served.
"""

import asyncio
from collections import OrderedDict

from embedding_server.serving.cost import Work
from embedding_server.serving.forecast import Drain
from embedding_server.serving.shares import Shares


class Waiter:
    """One request in line."""

    def __init__(self, work: Work, client: str) -> None:
        self.work = work
        self.client = client
        self.queued = self.granted = False
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Line:
    """One client's requests before a gate, oldest first."""

    def __init__(self) -> None:
        self.waiters: OrderedDict[Waiter, None] = OrderedDict()
        self.seconds = 0.0


class Gate:
    """One lane."""

    def __init__(self, cores: int) -> None:
        self.lines: dict[str, Line] = {}
        self.shares: Shares[str] = Shares()
        self.drain = Drain(float(cores))
        self.typical = Work(seconds=0.01, batches=0.1)
        self.depth = self.inside = 0
        self.inside_seconds = self.inside_batches = self._line_seconds = 0.0

    @property
    def seconds(self) -> float:
        """All work that is here."""
        return self.inside_seconds + self._line_seconds

    def enter(self, work: Work) -> None:
        """A request goes in."""
        self.inside += 1
        self.inside_seconds += work.seconds
        self.inside_batches += work.batches

    def leave(self, work: Work) -> None:
        """A request goes out."""
        self.inside -= 1
        self.inside_seconds = self.inside_seconds - work.seconds if self.inside else 0.0
        self.inside_batches = self.inside_batches - work.batches if self.inside else 0.0

    def queue(self, waiter: Waiter) -> None:
        """A request gets in line."""
        if not self.depth:
            self.drain.begin()
        line = self.lines.setdefault(waiter.client, Line())
        line.waiters[waiter] = None
        line.seconds += waiter.work.seconds
        self._line_seconds += waiter.work.seconds
        self.shares.join(waiter.client)
        self.depth += 1
        waiter.queued = True

    def drop(self, waiter: Waiter) -> None:
        """A request leaves the line."""
        line = self.lines[waiter.client]
        del line.waiters[waiter]
        line.seconds -= waiter.work.seconds
        self.depth -= 1
        self._line_seconds = self._line_seconds - waiter.work.seconds if self.depth else 0.0
        waiter.queued = False
        if not line.waiters:
            del self.lines[waiter.client]
            self.shares.leave(waiter.client)

    def take(self) -> Waiter:
        """Whose turn it is, out of line."""
        client = self.shares.next
        waiter = next(iter(self.lines[client].waiters))
        self.shares.charge(client, waiter.work.seconds)
        self.drop(waiter)
        return waiter

    def ahead(self, client: str, seconds: float) -> float:
        """Work in line that goes before new work of this client.

        While a client's line is served, every other one gets as much.
        """
        own = self.lines[client].seconds if client in self.lines else 0.0
        others = (line.seconds for name, line in self.lines.items() if name != client)
        return own + sum(min(other, own + seconds) for other in others)
