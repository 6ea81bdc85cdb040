"""What a run costs: the linear model that the schedule and admission predict by.

It is measured when a model is first loaded (`profile`) and corrected by every run (`Batcher`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec


class Work(NamedTuple):
    """Predicted work: seconds of one core, and how many full batches of its model that is."""

    seconds: float = 0.0
    batches: float = 0.0

    def towards(self, other: "Work", share: float) -> "Work":
        """So much of the way to the other."""
        return Work(
            self.seconds + share * (other.seconds - self.seconds),
            self.batches + share * (other.batches - self.batches),
        )


class Shape(NamedTuple):
    """A batch, as far as its cost depends on it; `pairs` are query-key pairs within texts."""

    texts: int = 0
    longest: int = 0
    tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, lengths: Iterable[int]) -> "Shape":
        """The shape of a batch of texts with so many tokens each."""
        shape = cls()
        for length in lengths:
            shape = shape.plus(length)
        return shape

    def plus(self, length: int) -> "Shape":
        """The shape with one text more."""
        texts, longest, tokens, pairs = self
        return Shape(texts + 1, max(longest, length), tokens + length, pairs + length * length)

    def padded(self) -> "Shape":
        """The shape with every text as long as the longest."""
        texts, longest, _, _ = self
        return Shape(texts, longest, texts * longest, texts * longest * longest)


class Cost(msgspec.Struct, frozen=True):
    """Seconds of a run: linear in runs, texts, tokens and query-key pairs.

    `padded` says that the graph computes every text as long as the batch's longest; graphs of
    `convert` do not. The defaults are a 6-layer, 384-wide model at 9,000 tokens/s.
    """

    run: float = 1.8e-3
    text: float = 1e-4
    token: float = 1.1e-4
    pair: float = 5e-8
    padded: bool = False

    def seconds(self, shape: Shape) -> float:
        """Predicted time of one run."""
        texts, _, tokens, pairs = shape.padded() if self.padded else shape
        return self.run + self.text * texts + self.token * tokens + self.pair * pairs

    def tokens(self, shape: Shape) -> int:
        """Tokens the run computes, which are what a batch's budget limits."""
        return shape.padded().tokens if self.padded else shape.tokens

    def overhead(self, shape: Shape) -> float:
        """Seconds beyond what the texts take by themselves, per token: the run's own, and padding.

        What texts take by themselves has to be spent in one batch or another.
        """
        alone = self.text * shape.texts + self.token * shape.tokens + self.pair * shape.pairs
        return (self.seconds(shape) - alone) / shape.tokens

    def corrected(self, factor: float) -> "Cost":
        """The same proportions, so many times as dear."""
        run, text, token, pair = (
            factor * part for part in (self.run, self.text, self.token, self.pair)
        )
        return Cost(run, text, token, pair, self.padded)
