"""The way out: bytes of vectors."""

import base64
import json

import numpy as np
import pytest

from embedding_server.api import encode
from embedding_server.api.encode import base64_row, json_items, json_object, json_vectors

ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


@pytest.mark.parametrize("at_once", [1, 12, 1_000_000])
async def test_json_vectors(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Written in parts or at once, every float32 survives the round trip."""
    monkeypatch.setattr(encode, "_FLOATS_AT_ONCE", at_once)
    assert np.array_equal(np.array(json.loads(await json_vectors(ROWS)), np.float32), ROWS)


@pytest.mark.parametrize("at_once", [1, 12, 1_000_000])
async def test_json_items(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Written in parts or at once, every row has its index and every float32 survives."""
    monkeypatch.setattr(encode, "_FLOATS_AT_ONCE", at_once)
    items = json.loads(await json_items(ROWS, lambda index, row: {"at": index, "row": row}))
    assert [one["at"] for one in items] == list(range(len(ROWS)))
    assert np.array_equal(np.array([one["row"] for one in items], np.float32), ROWS)


async def test_empty_rows() -> None:
    """No rows are an empty array."""
    assert await json_vectors(ROWS[:0]) == b"[]"
    assert await json_items(ROWS[:0], lambda index, row: {"at": index, "row": row}) == b"[]"


async def test_floats_are_shortest() -> None:
    """A float32 is written with the fewest digits that give it back."""
    assert await json_vectors(np.array([[0.1]], np.float32)) == b"[[0.1]]"


def test_base64_row() -> None:
    """A row in base64 decodes to the same float32, little-endian."""
    assert np.array_equal(np.frombuffer(base64.b64decode(base64_row(ROWS[3])), "<f4"), ROWS[3])


def test_json_object() -> None:
    """Values that are bytes stand as they are, others are encoded."""
    assert json.loads(json_object(a=b"[1]", b='x"y', c=3)) == {"a": [1], "b": 'x"y', "c": 3}


async def test_ragged_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text's many vectors are written in parts too, and come back whole."""
    monkeypatch.setattr(encode, "_FLOATS_AT_ONCE", 12)
    ragged = [ROWS, ROWS[:1], ROWS[:0]]
    written = json.loads(await json_vectors(ragged))
    assert [len(one) for one in written] == [7, 1, 0]
    assert np.array_equal(np.array(written[0], np.float32), ROWS)
