"""The way out: vectors as JSON floats or base64, and the bytes of an answer."""

import asyncio
import base64
import gzip
from typing import Any

import orjson

from embedding_server.core import Rows

_FLOATS_AT_ONCE = 256 * 1024
"""orjson holds the GIL while it writes: 2,048 x 4,096 floats stalled the event loop for 192 ms."""
_COMPRESS_FROM_BYTES = 1024


async def json_rows(rows: Rows) -> bytes:
    """A JSON array of arrays, float32 in its shortest form; the event loop runs in between."""
    step = max(1, _FLOATS_AT_ONCE // max(1, rows.shape[1]))
    parts = []
    for start in range(0, len(rows), step):
        if start:
            await asyncio.sleep(0)
        part = orjson.dumps(rows[start : start + step], option=orjson.OPT_SERIALIZE_NUMPY)
        parts.append(part[1:-1])
    return b"[" + b",".join(parts) + b"]"


def base64_rows(rows: Rows) -> bytes:
    """A JSON array of base64 strings, each the little-endian float32 of one vector."""
    return orjson.dumps([base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows])


def json_object(**fields: Any) -> bytes:
    """A JSON object; values that are bytes are JSON already."""
    return b"{%b}" % b",".join(
        b'"%b":%b' % (key.encode(), value if isinstance(value, bytes) else orjson.dumps(value))
        for key, value in fields.items()
    )


async def compressed(body: bytes, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """`body` gzipped off the event loop, and the headers that say so, where that is wanted."""
    if len(body) < _COMPRESS_FROM_BYTES or "gzip" not in accept_encoding:
        return body, {}
    packed = await asyncio.to_thread(gzip.compress, body, 1)
    return packed, {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
