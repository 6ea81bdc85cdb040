"""Which waiting texts run next: a state machine without clock, threads or I/O.

Texts wait in one line per model and lane. Small requests have a lane of their own that goes before
bulk, but while bulk waits, at most `INTERACTIVE_IN_A_ROW` batches in a row pass it by. Within a
lane the model with the oldest text goes first, and takes along the next oldest, or, where its graph
pads texts, those that `plan` picks by length.

What this guarantees: the oldest text of a lane is in the lane's next batch. So an interactive text
with n older ones runs within `(n + 1) * 4 / 3` batches (rounded up), a bulk text within
`(n + 1) * 4`.
"""

import itertools
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from embedding_server.core import Ids
from embedding_server.serving.cost import Cost, Shape

INTERACTIVE_IN_A_ROW = 3
_INTERACTIVE_TEXTS = 4
"""A request of at most so many texts is a small one."""
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


M = TypeVar("M", bound=Costed)


class Entry(msgspec.Struct, eq=False):
    """One text that waits to be run.

    `job` and `index` say whose text it is and which one; `line` and `sequence` where it waits and
    since when, counted over all lines.
    """

    ids: Ids
    job: Any
    index: int
    line: "Line"
    sequence: int
    length: int


class Line:
    """The waiting texts of one model in one lane, by age, and where that is asked for by length."""

    def __init__(self, *, by_length: bool) -> None:
        self._sorted = by_length
        self._by_length: list[Entry] = []
        self._lengths: list[int] = []
        self._by_age: OrderedDict[int, Entry] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def oldest(self) -> Entry:
        """The text that has waited longest; there must be one."""
        return next(iter(self._by_age.values()))

    def add(self, entry: Entry) -> None:
        """Put a text in line."""
        if self._sorted:
            at = self._place(entry)
            self._by_length.insert(at, entry)
            self._lengths.insert(at, entry.length)
        self._by_age[entry.sequence] = entry
        self.tokens += entry.length

    def remove(self, entry: Entry) -> None:
        """Take a text out of line, if it is in it."""
        if self._by_age.pop(entry.sequence, None) is None:
            return
        self.tokens -= entry.length
        if self._sorted:
            at = self._place(entry)
            del self._by_length[at], self._lengths[at]

    def plan(self, budget: int, cost: Cost) -> list[Entry]:
        """The next batch: the oldest text and those that go best with it."""
        if self._sorted:
            start, stop = plan(self._lengths, self._place(self.oldest), budget, cost)
            return self._by_length[start:stop]
        sizes = itertools.accumulate(entry.length for entry in self._by_age.values())
        fitting = sum(1 for _ in itertools.takewhile(lambda size: size <= budget, sizes))
        return list(itertools.islice(self._by_age.values(), max(1, fitting)))

    def _place(self, entry: Entry) -> int:
        return bisect_left(self._by_length, _order(entry), key=_order)


def _order(entry: Entry) -> tuple[int, int]:
    return entry.length, entry.sequence


class Schedule(Generic[M]):
    """The lines of all models of a device.

    Args:
        max_batch_tokens: tokens per batch, a longer text goes alone; None = as suits the model.
    """

    def __init__(self, max_batch_tokens: int | None) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._lines: dict[tuple[Lane, M], Line] = {}
        self._sequence = itertools.count()
        self._passed_by = 0

    def __repr__(self) -> str:
        texts = dict.fromkeys(Lane, 0)
        for (lane, _), line in self._lines.items():
            texts[lane] += len(line)
        return f"Schedule(interactive={texts[Lane.INTERACTIVE]}, bulk={texts[Lane.BULK]})"

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def budget(self, model: M) -> int:
        """Tokens per batch of a model."""
        return self._max_batch_tokens or model.batch_tokens

    def waiting(self, model: M) -> int:
        """Texts of a model that wait."""
        return sum(len(line) for (_, owner), line in self._lines.items() if owner is model)

    def add(self, model: M, lane: Lane, job: Any, texts: Iterable[Ids]) -> list[Entry]:
        """Put a job's texts in line."""
        line = self._lines.get((lane, model))
        if line is None:
            line = self._lines[lane, model] = Line(by_length=model.cost.padded)
        entries = [
            Entry(
                ids=ids,
                job=job,
                index=index,
                line=line,
                sequence=next(self._sequence),
                length=len(ids),
            )
            for index, ids in enumerate(texts)
        ]
        for entry in entries:
            line.add(entry)
        return entries

    def take(self, free: int) -> tuple[M, list[Entry]] | None:
        """The next batch and its model, taken out of line.

        None when nothing waits, or when the model whose turn it is needs more cores: it is not
        passed by.

        Args:
            free: idle cores; what waits is divided between the runs they can take, so that a lone
                request of many texts uses all of them.
        """
        waiting = [(key, line) for key, line in self._lines.items() if line]
        if not waiting:
            return None
        lanes = {lane for (lane, _), _ in waiting}
        lane = self._next_lane(lanes)
        (_, model), line = min(
            ((key, line) for key, line in waiting if key[0] is lane),
            key=lambda item: item[1].oldest.sequence,
        )
        if model.threads > free:
            return None
        share = sum(line.tokens for _, line in waiting) // (free // model.threads)
        budget = min(self.budget(model), max(share, _SHARE_FLOOR))
        batch = line.plan(budget, model.cost)
        for entry in batch:
            line.remove(entry)
        if lane is Lane.BULK:
            self._passed_by = 0
        elif Lane.BULK in lanes:
            self._passed_by += 1
        return model, batch

    def _next_lane(self, waiting: set[Lane]) -> Lane:
        if Lane.INTERACTIVE not in waiting:
            return Lane.BULK
        bulk_is_due = Lane.BULK in waiting and self._passed_by >= INTERACTIVE_IN_A_ROW
        return Lane.BULK if bulk_is_due else Lane.INTERACTIVE


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
