"""How a graph computes its linear layers: in fp32, in int8, or in fp32 while being watched.

Families call one such strategy for everything that shares an input, so that the input is quantised
once.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_server.convert.checkpoint import Checkpoint
from embedding_server.convert.graph import Graph

Linear = Callable[[Graph, Checkpoint, Sequence[str], str], list[str]]
"""(graph, weights, names of linear layers, their input (tokens, width)) -> their outputs."""


class InputScale(msgspec.Struct, frozen=True):
    """How an input becomes 8-bit integers: `round(input / channels) + zero_point`, within 0 to 255.

    `channels` has shape (width,). It is the same for every text, so that nothing depends on what
    else is in a batch.
    """

    channels: NDArray[np.float32]
    zero_point: int


def in_fp32(g: Graph, weights: Checkpoint, names: Sequence[str], states: str) -> list[str]:
    """`states @ W.T + b` for each layer, b where there is one; torch stores W as (out, in)."""
    return [
        g.node(
            "Gemm", states, stored(g, weights, f"{name}.weight"), *_bias(g, weights, name), transB=1
        )
        for name in names
    ]


def stored(g: Graph, weights: Checkpoint, name: str) -> str:
    """A tensor of the checkpoint as it is; float32 stays where it lies in the file."""
    place = weights.place(name)
    if place:
        return g.borrow(name, place)
    return g.stream(name, weights.shape(name), partial(weights.rows, name))


def bias_of(g: Graph, weights: Checkpoint, name: str) -> str:
    """A layer's bias; empty where it has none."""
    full = f"{name}.bias"
    return g.weight(full, weights(full)) if full in weights else ""


def _bias(g: Graph, weights: Checkpoint, name: str) -> list[str]:
    bias = bias_of(g, weights, name)
    return [bias] if bias else []


class Watched:
    """Computes in fp32 and makes every input an output, named after its first layer."""

    def __init__(self) -> None:
        self.groups: dict[str, Sequence[str]] = {}
        """That name -> the layers that share the input."""

    def __call__(
        self, g: Graph, weights: Checkpoint, names: Sequence[str], states: str
    ) -> list[str]:
        """See `Linear`."""
        self.groups[names[0]] = names
        g.output(names[0], states, "tokens", weights(f"{names[0]}.weight").shape[1])
        return in_fp32(g, weights, names, states)


def in_int8(scales: Mapping[str, InputScale], limit: int) -> Linear:
    """8-bit products, except for layers without a scale.

    Args:
        scales: first layer of a group -> its input's scale.
        limit: largest absolute value of a weight, at most 127.
    """

    def project(g: Graph, weights: Checkpoint, names: Sequence[str], states: str) -> list[str]:
        scale = scales.get(names[0])
        if scale is None:
            return in_fp32(g, weights, names, states)
        one, zero = g.constant(np.float32(1)), g.constant(np.uint8(scale.zero_point))
        inverse = g.weight(f"{names[0]}.inverse", 1 / scale.channels)
        numbers = g.node("QuantizeLinear", g.node("Mul", states, inverse), one, zero)

        def product(name: str) -> str:
            integers, steps = quantized(weights(f"{name}.weight").T, scale, limit)
            return g.contrib(
                "MatMulIntegerToFloat",
                numbers,
                g.weight(f"{name}.weight", integers.astype(np.int8)),
                one,
                g.weight(f"{name}.steps", steps),
                zero,
                "",
                bias_of(g, weights, name),
            )

        return [product(name) for name in names]

    return project


def quantized(
    weight: NDArray[Any], scale: InputScale, limit: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole numbers of shape (in, out) and one step per column; the input's scale is taken in."""
    scaled = weight * scale.channels[:, None]
    steps = np.abs(scaled).max(axis=0) / limit + np.finfo(np.float32).tiny
    return np.round(scaled / steps), steps.astype(np.float32)
