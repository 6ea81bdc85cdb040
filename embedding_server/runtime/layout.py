"""How a batch becomes the inputs of a graph, and its output the vectors.

Graphs of `convert` take the tokens of all texts behind one another. Exported ones take a row per
text, padded at its end, and mostly give a state per token, which is pooled here; those for images
take pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_server.core import (
    SEGMENT,
    SILENT,
    SPARSE,
    UNSEEN,
    Ids,
    Item,
    Picture,
    Pooling,
    Rows,
    Vectors,
)
from embedding_server.runtime import packed

Array = NDArray[Any]


class LayoutError(Exception):
    """The graph takes or gives what is not known; the message names it."""


class Value(msgspec.Struct, frozen=True):
    """An input or output of a graph, as the graph declares it; unknown sizes are not numbers."""

    name: str
    dtype: str
    shape: Sequence[Any]


class Layout(Protocol):
    """One way to lay texts out."""

    padded: bool
    """Whether every text is computed as long as its batch's longest."""
    output: str
    """The value that `vectors` are made from."""
    final: bool
    """Whether what follows pooling is in the graph."""

    def feeds(self, items: Sequence[Item]) -> dict[str, Array]:
        """The graph's inputs."""

    def vectors(self, value: Array, items: Sequence[Item]) -> Vectors:
        """Raw vectors, in order."""

    def sample(self, tokens: int) -> Item:
        """An input of about so many tokens, to measure with."""


class Packed:
    """That of `convert`'s graphs.

    Args:
        inputs: what the graph takes; ids and lengths, if nothing is said.
        pooling: of sparse ones, that their vectors hold every word of the vocabulary.

    Raises:
        LayoutError: an input is not known.
    """

    padded = False
    output = "sentence_embedding"
    final = False

    def __init__(
        self,
        inputs: Sequence[Value] = (),
        _outputs: Sequence[Value] = (),
        pooling: Pooling = Pooling.NONE,
    ) -> None:
        self._names = [one.name for one in inputs] or packed.LEAST
        if unknown := [name for name in self._names if name not in packed.INPUTS]:
            raise LayoutError(f"the graph takes {', '.join(unknown)}, which is not known")
        self._sparse = pooling is Pooling.SPLADE

    def feeds(self, texts: Sequence[Ids], width: int = 0) -> dict[str, Array]:
        """See `Layout`; the longest text counts as long as `width` at least."""
        return packed.feeds(texts, self._names, width)

    def vectors(self, value: Array, texts: Sequence[Ids]) -> Vectors:  # noqa: ARG002 - see `Layout`
        """See `Layout`."""
        return [sparse(row) for row in value] if self._sparse else value

    def sample(self, tokens: int) -> Ids:
        """See `Layout`."""
        return _ids(tokens)


class Padded:
    """That of exported graphs.

    Args:
        inputs: what the graph takes.
        outputs: what it gives; the best known one is used, else the first.
        pooling: for an output with a state per token.
        pad: the id that rows are filled up with.
        pooled_here: take token states even where the graph pools, too.

    Raises:
        LayoutError: an input is not known, or the output is neither vectors nor token states.
    """

    padded = True

    def __init__(
        self,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        pooling: Pooling,
        pad: int,
        *,
        pooled_here: bool = False,
    ) -> None:
        unknown = [one.name for one in inputs if _kind(one.name) not in _INPUTS]
        if unknown:
            raise LayoutError(f"the graph takes {', '.join(unknown)}, which is not known")
        odd = [f"{one.name} as {one.dtype}" for one in inputs if one.dtype not in _DTYPES]
        if odd:
            raise LayoutError(f"the graph takes {', '.join(odd)}, which is not known")
        by_name = {one.name: one for one in outputs}
        wanted = _WANTED.get(pooling, (*_STATES, *_OUTPUTS) if pooled_here else _OUTPUTS)
        best = next((by_name[name] for name in wanted if name in by_name), outputs[0])
        if pooling is Pooling.NONE and len(best.shape) == 3:
            raise LayoutError(f"output {best.name} has a state per token, and no pooling is known")
        if pooling is Pooling.TOKENS and len(best.shape) == 2:
            raise LayoutError(f"output {best.name} has no state per token, one is wanted")
        if len(best.shape) not in (2, 3):
            raise LayoutError(f"output {best.name} has {len(best.shape)} axes, expected 2 or 3")
        self.output = best.name
        self.final = len(best.shape) == 2
        self._inputs = inputs
        self._pooling = pooling
        self._pad = pad

    def feeds(self, texts: Sequence[Ids]) -> dict[str, Array]:
        """See `Layout`."""
        ids = np.full((len(texts), max(map(len, texts))), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, text & UNSEEN == 0
        return {one.name: _INPUTS[_kind(one.name)](one, ids, mask) for one in self._inputs}

    def vectors(self, value: Array, texts: Sequence[Ids]) -> Vectors:
        """See `Layout`; half precision becomes float32."""
        states = value.astype(np.float32, copy=False)
        if states.ndim == 3:
            return _POOLINGS[self._pooling](states, texts)
        return [sparse(row) for row in states] if self._pooling is Pooling.SPLADE else states

    def sample(self, tokens: int) -> Ids:
        """See `Layout`."""
        return _ids(tokens)


class Pixels:
    """That of graphs for images, all of one size.

    Args:
        inputs: what the graph takes; the first one is the images.
        outputs: what it gives; the pooled one is used, else the first.
        pooling: `CLS` or `NONE`.
        like: an image.

    Raises:
        LayoutError: it takes more than images.
    """

    padded = False
    final = True

    def __init__(
        self, inputs: Sequence[Value], outputs: Sequence[Value], pooling: Pooling, like: Picture
    ) -> None:
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs)
            raise LayoutError(f"the graph takes {names}, expected images alone")
        given = [one.name for one in outputs]
        self.output = next((name for name in _IMAGE_VECTORS if name in given), given[0])
        self._input = inputs[0]
        self._first = pooling is Pooling.CLS
        self._like = like

    def feeds(self, items: Sequence[Picture]) -> dict[str, Array]:
        """See `Layout`."""
        pixels = np.stack([one.pixels for one in items])
        return {self._input.name: pixels.astype(_DTYPES[self._input.dtype], copy=False)}

    def vectors(self, value: Array, items: Sequence[Picture]) -> Rows:
        """See `Layout`; axes of length 1 behind a vector are dropped."""
        rows = value[:, 0].copy() if self._first and value.ndim == 3 else value
        return rows.reshape(len(items), -1).astype(np.float32, copy=False)

    def sample(self, tokens: int) -> Picture:  # noqa: ARG002 - all images are alike
        """See `Layout`."""
        return self._like


_OUTPUTS = ("sentence_embedding", "text_embeds", "token_embeddings", "last_hidden_state")
"""Names of outputs to pool, the best first: what is pooled already before token states."""
_STATES = ("token_embeddings", "contextual", "last_hidden_state")
"""The same where a vector per token is wanted."""
_VECTORS = ("sentence_embedding", "text_embeds", "pooler_output", "logits")
"""The same for graphs that pool by themselves."""
_IMAGE_VECTORS = ("image_embeds", "pooler_output")
"""The same for graphs that take images."""
_WANTED = {
    Pooling.NONE: _VECTORS,
    Pooling.TOKENS: _STATES,
    Pooling.SPLADE: ("sentence_embedding", "logits"),
}

_DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}

Input = Callable[[Value, NDArray[np.int64], NDArray[np.int64]], Array]
"""(declaration, ids (texts, longest), mask of the same shape) -> the value fed."""


def _past(declared: Value, ids: NDArray[np.int64], _: NDArray[np.int64]) -> Array:
    """No keys or values from before, as (texts, heads, 0, width)."""
    _, heads, _, width = declared.shape
    return np.zeros((len(ids), heads, 0, width), _DTYPES[declared.dtype])


_INPUTS: Mapping[str, Input] = {
    "input_ids": lambda one, ids, _: (ids & SEGMENT - 1).astype(_DTYPES[one.dtype]),
    "attention_mask": lambda one, _, mask: mask.astype(_DTYPES[one.dtype]),
    "token_type_ids": lambda one, ids, _: (ids & SEGMENT != 0).astype(_DTYPES[one.dtype]),
    "position_ids": lambda one, ids, _: np.broadcast_to(
        np.arange(ids.shape[1], dtype=_DTYPES[one.dtype]), ids.shape
    ),
    "past_key_values": _past,
}


def _kind(name: str) -> str:
    """`past_key_values.3.key` is one of many alike."""
    return name.partition(".")[0]


def _ids(tokens: int) -> Ids:
    """Any ids do: time does not depend on them."""
    return np.ones(tokens, np.int64)


def sparse(row: NDArray[np.float32]) -> NDArray[Any]:
    """What is not zero in a vector of weights, as `SPARSE`."""
    (indices,) = row.nonzero()
    entries = np.empty(len(indices), SPARSE)
    entries["index"], entries["value"] = indices, row[indices]
    return entries


def _lengths(texts: Sequence[Ids]) -> NDArray[np.int64]:
    return np.array([len(ids) for ids in texts])


def _mean(states: Rows, texts: Sequence[Ids]) -> Rows:
    lengths = _lengths(texts)
    taken = np.arange(states.shape[1]) < lengths[:, None]
    weights: Rows = (taken / lengths[:, None]).astype(np.float32)
    means: Rows = np.matmul(weights[:, None, :], states)[:, 0]
    return means


def _splade(states: Rows, texts: Sequence[Ids]) -> Vectors:
    """The logarithm after the maximum, which it does not change: it is one row per text then."""
    return [
        sparse(np.log1p(np.maximum(one[: len(ids)].max(axis=0), 0.0)))
        for one, ids in zip(states, texts, strict=True)
    ]


def _tokens(states: Rows, texts: Sequence[Ids]) -> Vectors:
    return [one[: len(ids)][ids & SILENT == 0] for one, ids in zip(states, texts, strict=True)]


_POOLINGS: Mapping[Pooling, Callable[[Rows, Sequence[Ids]], Vectors]] = {
    Pooling.MEAN: _mean,
    Pooling.CLS: lambda states, _: states[:, 0].copy(),  # or all states live on
    Pooling.LAST: lambda states, texts: states[np.arange(len(states)), _lengths(texts) - 1],
    Pooling.TOKENS: _tokens,
    Pooling.SPLADE: _splade,
}
