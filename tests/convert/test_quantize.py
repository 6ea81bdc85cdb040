"""Choosing 8-bit ranges, and what comes of them, by numpy alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding_server.convert.linear import quantized
from embedding_server.convert.quantize import Int8, choose

RANDOM = np.random.default_rng(0)
WEIGHTS: dict[str, NDArray[np.float32]] = {
    f"{name}.weight": RANDOM.normal(size=(24, 16)).astype(np.float32) for name in "abcd"
}
GROUPS = {"a": ["a", "b"], "c": ["c"], "d": ["d"]}


def scales(inputs: NDArray[np.float32], limit: int = 127, fp32_share: float = 0.0) -> Any:
    """What is chosen where every group has these inputs."""
    int8 = Int8(sample=lambda *_: {}, key="", limit=limit, fp32_share=fp32_share)
    return choose(WEIGHTS.__getitem__, GROUPS, int8, dict.fromkeys(GROUPS, inputs))


@given(st.sampled_from([63, 127]), st.sampled_from(["mixed", "positive", "negative", "zero"]))
def test_products_are_close(limit: int, kind: str) -> None:
    """Integers of the input times integers of the weight are the product, within the range."""
    inputs = np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32)
    inputs[:, 3] *= 50  # a channel that would leave the others no steps
    signs = {"mixed": inputs, "positive": abs(inputs), "negative": -abs(inputs), "zero": 0 * inputs}
    inputs = signs[kind]
    scale = scales(inputs, limit)["a"]
    assert 0 <= scale.zero_point <= 255
    weight = WEIGHTS["b.weight"].T
    integers, steps = quantized(weight, scale, limit)
    assert np.abs(integers).max() <= limit
    numbers = np.clip(np.round(inputs / scale.channels) + scale.zero_point, 0, 255)
    product = ((numbers - scale.zero_point) @ integers) * steps
    exact = inputs @ weight
    assert np.linalg.norm(product - exact) <= 0.05 * np.linalg.norm(exact) + 1e-9


def test_column_of_zeros() -> None:
    """An output that is always zero stays zero."""
    weight = WEIGHTS["a.weight"].T.copy()
    weight[:, 5] = 0
    integers, steps = quantized(weight, scales(np.ones((4, 16), np.float32))["a"], 127)
    assert np.isfinite(steps).all()
    assert not integers[:, 5].any()


@pytest.mark.parametrize(("share", "left"), [(0.0, 3), (0.01, 2), (0.5, 1), (1.0, 0)])
def test_worst_layers_stay_in_fp32(share: float, left: int) -> None:
    """So many groups of layers have no scale, rounded up."""
    inputs = RANDOM.normal(size=(50, 16)).astype(np.float32)
    assert len(scales(inputs, fp32_share=share)) == left
