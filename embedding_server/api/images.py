"""Image files out of requests: base64, bare or as data URIs; nothing is ever fetched."""

import base64
import binascii
import re
from collections.abc import Sequence

from embedding_server.errors import BadRequest

_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,", re.ASCII)
_REMOTE = re.compile(r"(https?|ftp|file)://", re.IGNORECASE)
_MAX_URI_CHARS = 100

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC"
"""A PNG file with one red pixel, for examples."""


def image_files(given: Sequence[str]) -> list[bytes]:
    """Image files out of base64 or data URIs; raises `BadRequest`."""
    return [_decoded(index, text) for index, text in enumerate(given)]


def _decoded(index: int, text: str) -> bytes:
    if _REMOTE.match(text):
        raise BadRequest(f"image {index} is an address: images are not fetched, send base64")
    start = _DATA_URI.match(text[:_MAX_URI_CHARS])
    try:
        return base64.b64decode(text[start.end() if start else 0 :], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadRequest(f"image {index} is no base64 and no data URI with it") from exc
