"""The way out: vectors as JSON floats or base64, and the bytes of an answer."""

import asyncio
import base64
import gzip
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from embedding_server.core import SPARSE, Rows, Vector, Vectors

_FLOATS_AT_ONCE = 256 * 1024
"""orjson holds the GIL while it writes: 2,048 x 4,096 floats stalled the event loop for 192 ms."""
_COMPRESS_FROM_BYTES = 1024

Form = Literal["int8", "uint8", "binary", "ubinary"]
"""What a vector's numbers may be written as in 8 bits or 1."""

Bytes = NDArray[np.int8 | np.uint8]
"""Vectors in such a form, shape (texts, dimensions), or an eighth of these, rounded up."""


def quantized(rows: Rows, form: Form, limit: float) -> Bytes:
    """Vectors in 8 bits or 1 bit per number, the forms of Cohere's `embedding_types`.

    `int8` is x / limit * 127, rounded to even and cut off at -127 and 127; `uint8` is that plus
    128. `ubinary` has a bit per number, 1 for x > 0, the first one in a byte's highest bit, and
    zeros behind the last number; `binary` is that byte minus 128. So packs sentence-transformers'
    `quantize_embeddings`; Cohere's API reference says "packed", signed and unsigned
    (https://docs.cohere.com/reference/embed).

    Args:
        rows: shape (texts, dimensions).
        form: what is wanted.
        limit: the magnitude that becomes 127; not 0 for `int8` and `uint8`, unused for others.
    """
    return _QUANTIZED[form](rows, limit)


def _int8(rows: Rows, limit: float) -> NDArray[np.int8]:
    assert limit > 0
    scaled = rows * np.float32(127 / limit)
    return np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled).astype(np.int8)


def _bits(rows: Rows, _: float) -> NDArray[np.uint8]:
    return np.packbits(rows > 0, axis=1)


_HIGHEST = np.uint8(128)
"""Changing this bit of a byte adds or takes 128, as signed and unsigned bytes read it."""
_QUANTIZED: Mapping[Form, Callable[[Rows, float], Bytes]] = {
    "int8": _int8,
    "uint8": lambda rows, limit: _int8(rows, limit).view(np.uint8) ^ _HIGHEST,
    "binary": lambda rows, limit: (_bits(rows, limit) ^ _HIGHEST).view(np.int8),
    "ubinary": _bits,
}


async def json_vectors(vectors: Vectors | Bytes) -> bytes:
    """A JSON array of arrays, float32 in its shortest form; the event loop runs in between.

    Of a sparse vector it is an array of `Weight`s.
    """
    if len(vectors) and vectors[0].dtype == SPARSE:
        return await json_items(vectors, _weights)
    if isinstance(vectors, list) and any(one.size > _FLOATS_AT_ONCE for one in vectors):
        return b"[" + b",".join([await json_vectors(one) for one in vectors]) + b"]"
    return await _json_array(vectors, lambda _, part: part)


async def json_items(vectors: Vectors | Bytes, item: Callable[[int, Vector], Any]) -> bytes:
    """A JSON array of `item(index, vector)`; arrays in them are written as in `json_vectors`."""
    return await _json_array(
        vectors, lambda start, part: [item(start + index, one) for index, one in enumerate(part)]
    )


async def _json_array(
    vectors: Vectors | Bytes, values: Callable[[int, Vectors | Bytes], Any]
) -> bytes:
    """The arrays `values(start, vectors from start on)` of so many at a time, as one."""
    step = max(1, _FLOATS_AT_ONCE // max([1, *(one.size for one in vectors)]))
    parts: list[bytes | memoryview] = [b"["]
    for start in range(0, len(vectors), step):
        if start:
            parts.append(b",")
            await asyncio.sleep(0)
        part = values(start, vectors[start : start + step])
        written = orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)
        parts.append(memoryview(written)[1:-1])
    parts.append(b"]")
    return b"".join(parts)  # copied once: 90 MB take 55 ms


class Weight(msgspec.Struct):
    """A word's, in a sparse vector."""

    index: int
    value: float


def _weights(_: int, vector: Vector) -> list[dict[str, Any]]:
    pairs = zip(vector["index"].tolist(), vector["value"], strict=True)
    return [{"index": index, "value": value} for index, value in pairs]


def base64_row(row: Vector) -> str:
    """The little-endian float32 of one vector, in base64."""
    return base64.b64encode(row.astype("<f4", copy=False).data).decode()


def json_object(**fields: Any) -> bytes:
    """A JSON object of at least one field; values that are bytes are JSON already."""
    parts = []
    for key, value in fields.items():
        parts += [
            b',"%b":' % key.encode(),
            value if isinstance(value, bytes) else orjson.dumps(value),
        ]
    parts[0] = b"{" + parts[0][1:]
    return b"".join([*parts, b"}"])


async def compressed(body: bytes, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """`body` gzipped off the event loop, and the headers that say so, where that is wanted."""
    if len(body) < _COMPRESS_FROM_BYTES or "gzip" not in accept_encoding:
        return body, {}
    packed = await asyncio.to_thread(gzip.compress, body, 1)
    return packed, {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
