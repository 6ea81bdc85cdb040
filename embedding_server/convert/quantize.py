"""Choosing how the inputs of linear layers become 8-bit integers.

Ranges are static, measured on sample texts: what a text's vector is must not depend on its
neighbours, and a scale per batch would make it so. Channels are smoothed as in SmoothQuant (Xiao et
al. 2022): a part of an input channel's range moves into the weights, with the strength that gives
the layer's output the least error on the samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_server.convert.linear import InputScale, quantized

Samples = Mapping[str, NDArray[np.float32]]
"""Name of an output -> rows of it."""

Weights = Callable[[str], NDArray[Any]]
"""Looks a tensor up by its name."""

_STRENGTHS = (0.5, 0.6, 0.7)
"""Stronger smoothing fits the samples better and unusual texts worse."""
_MARGIN = 1.2
"""Room above the sampled range, for the same reason."""


class Int8(msgspec.Struct, frozen=True):
    """What `convert` needs for an 8-bit graph.

    `sample` runs a graph and gives rows of the named outputs, `key` names what decides them;
    `limit` is the largest weight; `fp32_share` of the linear layers, those with the largest error,
    stay in fp32.
    """

    sample: Callable[[Path, Sequence[str]], Samples]
    key: str
    limit: int
    fp32_share: float


def choose(
    weights: Weights, groups: Mapping[str, Sequence[str]], int8: Int8, samples: Samples
) -> dict[str, InputScale]:
    """Scales of the groups' inputs, without those of the layers that suffer most."""
    best, limit = {}, int8.limit
    for name, names in groups.items():
        weight = np.concatenate([weights(f"{one}.weight").T for one in names], axis=1)
        candidates = [_scale(samples[name], weight, strength) for strength in _STRENGTHS]
        errors = [_error(samples[name], weight, scale, limit) for scale in candidates]
        at = int(np.argmin(errors))
        best[name] = (errors[at], candidates[at])
    kept = sorted(best, key=lambda name: best[name][0])
    kept = kept[: len(kept) - math.ceil(int8.fp32_share * len(kept))]
    return {name: best[name][1] for name in kept}


def _scale(inputs: NDArray[np.float32], weight: NDArray[Any], strength: float) -> InputScale:
    tiny = 1e-6
    lowest, highest = inputs.min(axis=0), inputs.max(axis=0)
    channels = np.maximum(np.abs(inputs).max(axis=0), tiny) ** strength
    channels /= np.maximum(np.abs(weight).max(axis=1), tiny) ** (1 - strength)
    low = _MARGIN * min(0.0, float((lowest / channels).min()))
    high = _MARGIN * max(0.0, float((highest / channels).max()))
    step = max(high - low, tiny) / 255
    return InputScale((channels * step).astype(np.float32), round(-low / step))


def _error(
    inputs: NDArray[np.float32], weight: NDArray[Any], scale: InputScale, limit: int
) -> float:
    """Mean square error of the layer's output rows, each relative to its length."""
    zero = scale.zero_point
    numbers = np.clip(np.round(inputs / scale.channels) + zero, 0, 255) - zero
    integers, steps = quantized(weight, scale, limit)
    exact = inputs @ weight
    off = np.square((numbers @ integers) * steps - exact).sum(axis=1)
    return float(np.mean(off / np.maximum(np.square(exact).sum(axis=1), 1e-12)))
