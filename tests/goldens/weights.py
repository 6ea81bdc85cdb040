"""Texts and random weights that tests and the scripts which make goldens have in common."""

import zlib

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 96
YES, NO = 10, 11
"""Ids of the tokens "yes" and "no"."""
_LENGTHS = (1, 7, 23, 40, 64, 2)


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random numbers that depend on a tensor's name alone; scales of norms are near 1."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    norm = "norm" in name.lower() or "_ln." in name
    near = 1.0 if norm and name.endswith("weight") else 0.0
    return random.normal(near, 0.2, shape).astype(np.float32)


def texts() -> list[list[int]]:
    """Ids of texts of many lengths."""
    random = np.random.default_rng(0)
    return [random.integers(5, VOCABULARY, length).tolist() for length in _LENGTHS]


def pairs() -> list[list[int]]:
    """Which text of a pair each id belongs to."""
    return [[int(at > length // 2) for at in range(length)] for length in _LENGTHS]
