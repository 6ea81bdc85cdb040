"""How a batch of texts becomes the inputs of a graph, and its output the vectors.

Graphs of `convert` take the tokens of all texts behind one another. Exported ones take a row per
text, padded at its end, and mostly give a state per token, which is pooled here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_server.core import SEGMENT, Ids, Pooling, Rows

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
    """The value that `rows` is made from."""

    def feeds(self, texts: Sequence[Ids]) -> dict[str, Array]:
        """The graph's inputs."""

    def rows(self, value: Array, texts: Sequence[Ids]) -> Rows:
        """Raw vectors of shape (texts, dimensions), in order."""


class Packed:
    """That of `convert`'s graphs."""

    padded = False
    output = "sentence_embedding"

    def feeds(self, texts: Sequence[Ids]) -> dict[str, Array]:
        """See `Layout`."""
        lengths = np.array([len(ids) for ids in texts], np.int64)
        return {"input_ids": np.concatenate(texts), "lengths": lengths}

    def rows(self, value: Array, texts: Sequence[Ids]) -> Rows:  # noqa: ARG002 - see `Layout`
        """See `Layout`."""
        return value


class Padded:
    """That of exported graphs.

    Args:
        inputs: what the graph takes.
        outputs: what it gives; the best known one is used, else the first.
        pooling: for an output with a state per token.
        pad: the id that rows are filled up with.

    Raises:
        LayoutError: an input is not known, or the output is neither vectors nor token states.
    """

    padded = True

    def __init__(
        self, inputs: Sequence[Value], outputs: Sequence[Value], pooling: Pooling, pad: int
    ) -> None:
        unknown = [one.name for one in inputs if _kind(one.name) not in _INPUTS]
        if unknown:
            raise LayoutError(f"the graph takes {', '.join(unknown)}, which is not known")
        odd = [f"{one.name} as {one.dtype}" for one in inputs if one.dtype not in _DTYPES]
        if odd:
            raise LayoutError(f"the graph takes {', '.join(odd)}, which is not known")
        by_name = {one.name: one for one in outputs}
        wanted = _VECTORS if pooling is Pooling.NONE else _OUTPUTS
        best = next((by_name[name] for name in wanted if name in by_name), outputs[0])
        if pooling is Pooling.NONE and len(best.shape) == 3:
            raise LayoutError(f"output {best.name} has a state per token, and no pooling is known")
        if len(best.shape) not in (2, 3):
            raise LayoutError(f"output {best.name} has {len(best.shape)} axes, expected 2 or 3")
        self.output = best.name
        self._inputs = inputs
        self._pool = _POOLINGS.get(pooling)
        self._pad = pad

    def feeds(self, texts: Sequence[Ids]) -> dict[str, Array]:
        """See `Layout`."""
        ids = np.full((len(texts), max(map(len, texts))), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        return {one.name: _INPUTS[_kind(one.name)](one, ids, mask) for one in self._inputs}

    def rows(self, value: Array, texts: Sequence[Ids]) -> Rows:
        """See `Layout`; half precision becomes float32."""
        states = value.astype(np.float32, copy=False)
        if states.ndim == 2 or not self._pool:
            return states
        return self._pool(states, np.array([len(ids) for ids in texts]))


_OUTPUTS = ("sentence_embedding", "text_embeds", "token_embeddings", "last_hidden_state")
"""Names of outputs to pool, the best first: what is pooled already before token states."""
_VECTORS = ("sentence_embedding", "text_embeds", "pooler_output", "logits")
"""The same for graphs that pool by themselves."""

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
    "input_ids": lambda one, ids, _: (ids % SEGMENT).astype(_DTYPES[one.dtype]),
    "attention_mask": lambda one, _, mask: mask.astype(_DTYPES[one.dtype]),
    "token_type_ids": lambda one, ids, _: (ids // SEGMENT).astype(_DTYPES[one.dtype]),
    "position_ids": lambda one, ids, _: np.broadcast_to(
        np.arange(ids.shape[1], dtype=_DTYPES[one.dtype]), ids.shape
    ),
    "past_key_values": _past,
}


def _kind(name: str) -> str:
    """`past_key_values.3.key` is one of many alike."""
    return name.partition(".")[0]


def _mean(states: Rows, lengths: NDArray[np.int64]) -> Rows:
    taken = np.arange(states.shape[1]) < lengths[:, None]
    weights: Rows = (taken / lengths[:, None]).astype(np.float32)
    means: Rows = np.matmul(weights[:, None, :], states)[:, 0]
    return means


_POOLINGS: Mapping[Pooling, Callable[[Rows, NDArray[np.int64]], Rows]] = {
    Pooling.MEAN: _mean,
    Pooling.CLS: lambda states, _: states[:, 0],
    Pooling.LAST: lambda states, lengths: states[np.arange(len(states)), lengths - 1],
}
