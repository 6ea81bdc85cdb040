"""The way out: bytes of vectors."""

import base64
import json

import numpy as np
import pytest

from embedding_server.api import encode
from embedding_server.api.encode import (
    Form,
    base64_row,
    json_items,
    json_object,
    json_vectors,
    quantized,
)

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


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("int8", [[0, 64, -64, 127, -127, 127, -127, 1, 2]]),
        ("uint8", [[128, 192, 64, 255, 1, 255, 1, 129, 130]]),
        ("ubinary", [[0b01010101, 0b10000000]]),
        ("binary", [[0b01010101 - 128, 0b10000000 - 128]]),
    ],
)
def test_quantized(form: Form, expected: list[list[int]]) -> None:
    """By hand: halves go to even, what is beyond the limit is cut off, zero's bit is 0."""
    steps = [0, 63.5, -63.5, 127, -127, 500, -500, 0.5000001, 2.5]
    found = quantized(np.array([steps], np.float32) * (2 / 127), form, 2.0)
    assert found.tolist() == expected


def test_bits_come_back() -> None:
    """Unpacked bits are the signs, in order; of `binary` once 128 is added."""
    signs = ROWS > 0
    packed, shifted = quantized(ROWS, "ubinary", 0.0), quantized(ROWS, "binary", 0.0)
    assert [one.dtype.name for one in (packed, shifted)] == ["uint8", "int8"]
    assert packed.shape == (7, 1)
    assert np.array_equal(shifted.astype(int) + 128, packed)
    assert np.array_equal(np.unpackbits(packed.view(np.uint8), axis=1)[:, :5], signs)
    assert not (packed & 0b111).any()


@pytest.mark.parametrize("form", ["int8", "uint8", "binary", "ubinary"])
def test_alone_or_among_others(form: Form) -> None:
    """A row's bytes do not depend on the rows beside it, and the floats stay as they were."""
    before = ROWS.copy()
    together = quantized(ROWS, form, 1.5)
    apart = [quantized(ROWS[index : index + 1], form, 1.5)[0] for index in range(len(ROWS))]
    assert np.array_equal(together, np.stack(apart))
    assert np.array_equal(ROWS, before)
    assert quantized(ROWS[:0], form, 1.5).shape == together[:0].shape


@pytest.mark.parametrize("at_once", [1, 12, 1_000_000])
@pytest.mark.parametrize("form", ["int8", "uint8", "binary", "ubinary"])
async def test_json_of_bytes(monkeypatch: pytest.MonkeyPatch, form: Form, at_once: int) -> None:
    """They are written as integers, in parts or at once."""
    monkeypatch.setattr(encode, "_FLOATS_AT_ONCE", at_once)
    found = quantized(ROWS, form, 1.5)
    assert json.loads(await json_vectors(found)) == found.tolist()
    items = json.loads(await json_items(found, lambda index, row: [index, row]))
    assert items == [[index, row] for index, row in enumerate(found.tolist())]
