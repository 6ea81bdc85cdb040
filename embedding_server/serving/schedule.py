"""Which waiting texts run next: a state machine without clock, threads or I/O.

Clients take turns: the one that has had the fewest tokens goes first. Of its texts, those of small
requests have a lane of their own that goes before bulk, but while bulk waits, at most
`INTERACTIVE_IN_A_ROW` batches in a row pass it by. Within a lane the model with the oldest text
goes first. That text takes along the client's next oldest and then, in turn, other clients' texts
of the same lane and model; or, where the graph pads texts, those of them that `plan` picks by
length.

What this guarantees: of two clients that wait, neither gets more than two batches ahead of the
other, or than one text that is longer, and the oldest text of a client's lane is in the lane's next
batch. So of the batches that begin with a client's text, an interactive text with n older ones of
that client runs within `(n + 1) * 4 / 3` (rounded up), a bulk text within `(n + 1) * 4`.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from embedding_server.core import Item
from embedding_server.serving.cost import Cost, Shape
from embedding_server.serving.shares import Shares

INTERACTIVE_IN_A_ROW = 3
_INTERACTIVE_TEXTS = 4
"""A request of at most so many texts is a small one."""
_POOL = 16
"""Batches' worth of the oldest texts that `plan` may choose from."""
_SHARE_FLOOR = 64
"""Tokens below which a batch is not divided between idle slots: a run costs as much as 16."""


class Lane(IntEnum):
    """Who goes first."""

    INTERACTIVE = 0
    BULK = 1

    @classmethod
    def of(cls, texts: int) -> "Lane":
        """The lane of a request of so many texts."""
        return cls.INTERACTIVE if texts <= _INTERACTIVE_TEXTS else cls.BULK


class Costed(Protocol):
    """A model, as far as scheduling knows it."""

    cost: Cost

    @property
    def batch_tokens(self) -> int:
        """Tokens per batch that suit it."""

    @property
    def threads(self) -> int:
        """Cores that a run takes."""

    def allowed(self, tokens: int) -> int:
        """So many tokens per batch, or as many as there is memory for."""

    def room(self, tokens: int) -> int:
        """So many tokens of another batch, or as many as there is memory for beside what runs."""


M = TypeVar("M", bound=Costed)


class Entry(msgspec.Struct, eq=False):
    """One text that waits to be run.

    `job` and `index` say whose text it is and which one, `line` where it waits, `sequence` since
    when, counted over all lines.
    """

    item: Item
    job: Any
    index: int
    line: "Line[Any]"
    sequence: int
    length: int


class Line(Generic[M]):
    """The waiting texts of one client, lane and model, by age."""

    def __init__(self, client: str, lane: Lane, model: M) -> None:
        self.client, self.lane, self.model = client, lane, model
        self.entries: OrderedDict[int, Entry] = OrderedDict()

    @property
    def oldest(self) -> Entry:
        """The text that has waited longest; there must be one."""
        return next(iter(self.entries.values()))


class _Client(Generic[M]):
    """The lines of one client that have texts, and how often bulk was passed by in a row."""

    def __init__(self) -> None:
        self.lines: dict[tuple[Lane, M], Line[M]] = {}
        self.passed_by = 0

    def next_line(self) -> Line[M]:
        """The line whose turn it is."""
        lanes = {lane for lane, _ in self.lines}
        bulk_is_due = self.passed_by >= INTERACTIVE_IN_A_ROW
        lane = max(lanes) if bulk_is_due else min(lanes)
        lines = [line for line in self.lines.values() if line.lane is lane]
        return min(lines, key=lambda line: line.oldest.sequence)

    def went(self, lane: Lane) -> None:
        """A batch began with a text of this lane."""
        if lane is Lane.BULK:
            self.passed_by = 0
        elif any(one is Lane.BULK for one, _ in self.lines):
            self.passed_by += 1


class Schedule(Generic[M]):
    """The waiting texts of all clients and models of a device.

    Args:
        max_batch_tokens: tokens per batch, a longer text goes alone; None = as suits the model.
    """

    def __init__(self, max_batch_tokens: int | None) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._clients: dict[str, _Client[M]] = {}
        self._shares: Shares[str] = Shares()
        self._sequence = itertools.count()
        self._texts = dict.fromkeys(Lane, 0)
        self._tokens = 0

    def __repr__(self) -> str:
        interactive, bulk = (self._texts[lane] for lane in Lane)
        return f"Schedule(interactive={interactive}, bulk={bulk})"

    def __bool__(self) -> bool:
        return bool(self._clients)

    def budget(self, model: M) -> int:
        """Tokens per batch of a model."""
        return model.allowed(self._max_batch_tokens or model.batch_tokens)

    def waiting(self, model: M) -> int:
        """Texts of a model that wait."""
        lines = (line for client in self._clients.values() for line in client.lines.values())
        return sum(len(line.entries) for line in lines if line.model is model)

    def add(
        self, model: M, lane: Lane, client: str, job: Any, items: Iterable[Item]
    ) -> list[Entry]:
        """Put a job's texts in line."""
        line = Line(client, lane, model)
        if client in self._clients:
            line = self._clients[client].lines.get((lane, model), line)
        entries = [
            Entry(
                item=item,
                job=job,
                index=index,
                line=line,
                sequence=next(self._sequence),
                length=len(item),
            )
            for index, item in enumerate(items)
        ]
        if entries:
            self._shares.join(client)
            self._clients.setdefault(client, _Client()).lines[lane, model] = line
        line.entries.update((entry.sequence, entry) for entry in entries)
        self._texts[lane] += len(entries)
        self._tokens += sum(entry.length for entry in entries)
        return entries

    def remove(self, entry: Entry) -> None:
        """Take a text out of line, if it is in it."""
        line = entry.line
        if line.entries.pop(entry.sequence, None) is None:
            return
        self._texts[line.lane] -= 1
        self._tokens -= entry.length
        if line.entries:
            return
        client = self._clients[line.client]
        del client.lines[line.lane, line.model]
        if not client.lines:
            del self._clients[line.client]
            self._shares.leave(line.client)

    def take(self, free: int) -> tuple[M, list[Entry]] | None:
        """The next batch and its model, taken out of line.

        None when nothing waits, or when the model whose turn it is needs more cores, or its oldest
        text memory that the model's own runs hold: it is not passed by.

        Args:
            free: idle cores; what waits is divided between the runs they can take, so that a lone
                request of many texts uses all of them.
        """
        if not self._clients:
            return None
        client = self._clients[self._shares.next]
        line = client.next_line()
        model = line.model
        if model.threads > free:
            return None
        share = self._tokens // (free // model.threads)
        budget, oldest = min(self.budget(model), max(share, _SHARE_FLOOR)), line.oldest.length
        room = model.room(max(budget, oldest))
        if room < oldest:
            return None
        batch = self._batch(line, min(budget, room))
        client.went(line.lane)
        for entry in batch:
            self._shares.charge(entry.line.client, entry.length)
        for entry in batch:
            self.remove(entry)
        return model, batch

    def _batch(self, line: Line[M], budget: int) -> list[Entry]:
        """The line's oldest text and those that go best with it."""
        cost, oldest = line.model.cost, line.oldest
        candidates = self._in_turn(line, budget)
        if not cost.padded:
            return _fitting(candidates, budget)
        pool = sorted(_fitting(candidates, _POOL * budget), key=_by_length)
        lengths = [entry.length for entry in pool]
        start, stop = plan(lengths, pool.index(oldest), budget, cost)
        return pool[start:stop]

    def _in_turn(self, line: Line[M], lead: int) -> Iterator[Entry]:
        """The line's texts by age, then those of other clients' lines of its lane and model.

        Clients that have had so many tokens more than its own are left out.
        """
        yield from line.entries.values()
        key = line.lane, line.model
        others = [name for name, client in self._clients.items() if key in client.lines]
        for name in self._shares.in_turn(others, line.client, lead):
            if name != line.client:
                yield from self._clients[name].lines[key].entries.values()


def _fitting(entries: Iterable[Entry], tokens: int) -> list[Entry]:
    """The first of them that have so many tokens together, one at least."""
    batch: list[Entry] = []
    for entry in entries:
        tokens -= entry.length
        if tokens < 0 and batch:
            break
        batch.append(entry)
    return batch


def _by_length(entry: Entry) -> tuple[int, int]:
    return entry.length, entry.sequence


def plan(lengths: Sequence[int], anchor: int, budget: int, cost: Cost) -> tuple[int, int]:
    """The slice of ascending `lengths` around `anchor` with the least overhead per token.

    It computes at most `budget` tokens, unless it is the anchor alone. For every upper end that
    fits, shorter texts join as long as each makes the overhead less.

    Returns:
        `(start, stop)` with `start <= anchor < stop`.
    """
    best, least = (anchor, anchor + 1), math.inf
    above = Shape()
    for stop in range(anchor + 1, len(lengths) + 1):
        above = above.plus(lengths[stop - 1])
        if cost.tokens(above) > budget and above.texts > 1:
            break
        more_alike = lengths[stop : stop + 1] == [above.longest]
        if more_alike and cost.tokens(above.plus(above.longest)) <= budget:
            continue  # one more of the same length is never dearer
        start, shape, overhead = anchor, above, cost.overhead(above)
        while start and cost.tokens(more := shape.plus(lengths[start - 1])) <= budget:
            if (extended := cost.overhead(more)) > overhead:
                break
            start, shape, overhead = start - 1, more, extended
        if overhead < least:
            best, least = (start, stop), overhead
    return best
