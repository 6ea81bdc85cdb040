"""What graphs of `convert` take: the tokens of all texts behind one another, and where they are.

Graphs for a CPU work out from the lengths alone what they need; those for CUDA take it from here.
`longest` texts are counted to a multiple of 16 where the graph takes `steps`, which its kernels
want.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_server.core import SEGMENT, Ids

Array = NDArray[Any]
_ROUND = 16


class Tokens:
    """The tokens of a batch.

    Args:
        texts: its texts.
        width: as long as the longest counts at least, and a multiple of `step`.
    """

    def __init__(self, texts: Sequence[Ids], width: int, step: int) -> None:
        self.ids = np.concatenate(texts)
        self.lengths = np.array([len(ids) for ids in texts])
        self.longest = int(self.lengths.max())
        self.width = -(-max(width, self.longest) // step) * step

    @cached_property
    def starts(self) -> Array:
        """Which token is the first of each text."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    def texts(self) -> Array:
        """The text of each token, (tokens, 1)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)[:, None]

    def positions(self) -> Array:
        """Of each token in its text."""
        return np.asarray(np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths))

    def rows(self) -> Array:
        """Where each token is, if every text is as long as `width`."""
        moved = np.arange(len(self.lengths)) * self.width - self.starts
        return np.arange(len(self.ids)) + np.repeat(moved, self.lengths)

    def offsets(self) -> Array:
        """The same, and behind them those that no token has, shape (texts, width)."""
        cells = len(self.lengths) * self.width
        offsets = np.arange(cells, dtype=np.int32)
        if cells > len(self.ids):
            rows, free = self.rows(), np.ones(cells, bool)
            free[rows] = False
            offsets[: len(rows)], offsets[len(rows) :] = rows, np.flatnonzero(free)
        return offsets.reshape(-1, self.width)

    def slots(self) -> Array:
        """The token at each of them, (texts, width); behind a text's end its last one."""
        steps = np.minimum(np.arange(self.width), self.lengths[:, None] - 1)
        return np.asarray(self.starts[:, None] + steps)


INPUTS: Mapping[str, Callable[[Tokens], Array]] = {
    "input_ids": lambda batch: batch.ids & SEGMENT - 1,
    "token_type_ids": lambda batch: (batch.ids & SEGMENT != 0).astype(np.int64),
    "lengths": lambda batch: batch.lengths,
    "positions": Tokens.positions,
    "token_offset": Tokens.offsets,
    "cumulative_sequence_length": lambda batch: np.append(0, np.cumsum(batch.lengths)).astype(
        np.int32
    ),
    # Behind the longest text's end no bias is used, but it must be in its table.
    "steps": lambda batch: np.minimum(np.arange(batch.width), batch.longest - 1),
    "texts_of_tokens": Tokens.texts,
    "shares": lambda batch: (1 / batch.lengths[:, None]).astype(np.float32),
    "firsts": lambda batch: batch.starts,
    "lasts": lambda batch: batch.starts + batch.lengths - 1,
    "rows": Tokens.rows,
    "slots": Tokens.slots,
    "seqlens_k": lambda batch: (batch.lengths - 1).astype(np.int32),
    "total_sequence_length": lambda batch: np.array([batch.width], np.int32),
}
"""Name of an input -> its value."""

ON_HOST = ("total_sequence_length",)
"""Those that stay on the host where others are on a GPU."""

LEAST = ("input_ids", "lengths")
"""What graphs for a CPU take."""


def feeds(texts: Sequence[Ids], names: Collection[str] = LEAST, width: int = 0) -> dict[str, Array]:
    """The inputs of that name; the longest text counts as long as `width` at least."""
    batch = Tokens(texts, width, _ROUND if "steps" in names else 1)
    return {name: INPUTS[name](batch) for name in names}
