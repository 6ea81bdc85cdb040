"""Compressed bodies: unpacked piece by piece, and no further than is allowed.

A thousandth of a body's length is enough to say it in gzip or zstd. Where the data say how long
they are unpacked, and that is too much, next to nothing of them is unpacked. Beyond 512 KiB they
may become a hundred times as long as they are: nothing but repetition becomes more.
"""

import sys
import zlib
from collections.abc import Callable, Iterator

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from embedding_server.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

_INPUT, _PIECE = 1 << 16, 1 << 20
_PROBED = 1 << 20
"""Bytes after which data that claim to be too large are believed; damaged ones end before."""
_ANY_RATIO, _MOST_TIMES = 1 << 19, 100
"""Bytes that every body may become, and how many times its own size if that is more."""
_WINDOW_LOG = 23
"""RFC 9659: bodies in zstd need no more memory than 8 MiB to look back at."""


def too_large(limit: int) -> PayloadTooLarge:
    """What bodies over so many bytes are refused with."""
    return PayloadTooLarge(f"the body is over {limit} bytes: send fewer texts per request")


def unpacked_size(body: bytes, encoding: str) -> int | None:
    """How long `body` says it is without its encoding, which nobody has checked; None: unknown.

    Raises:
        UnsupportedMediaType: another encoding than gzip and zstd.
        BadRequest: the data are damaged.
    """
    try:
        return _known(encoding)[0](body)
    except zstd.ZstdError as exc:
        raise _damaged(encoding, str(exc)) from exc


def decompress(body: bytes, encoding: str, limit: int) -> bytearray:
    """`body` without its content encoding; never more than `limit` bytes.

    Raises:
        UnsupportedMediaType: another encoding.
        PayloadTooLarge: it would be longer than `limit`, or too many times its own size.
        BadRequest: the data are damaged.
    """
    said = unpacked_size(body, encoding)
    allowed = min(limit, max(_ANY_RATIO, _MOST_TIMES * len(body)))
    if said is None:
        said = allowed
    bound = said if said <= allowed else min(allowed, _PROBED)
    plain = bytearray()
    try:
        for piece in _known(encoding)[1](body):
            plain += piece
            if len(plain) > bound:
                break
    except (zlib.error, zstd.ZstdError, EOFError) as exc:
        raise _damaged(encoding, str(exc)) from exc
    if len(plain) <= bound:
        return plain
    if bound == said < allowed:
        raise _damaged(encoding, "it is longer than it says")
    if allowed == limit:
        raise too_large(limit)
    raise PayloadTooLarge(
        f"the body unpacks to over {_MOST_TIMES} times its size: send it without Content-Encoding"
    )


def _gzip_size(body: bytes) -> int:
    """RFC 1952: the last four bytes."""
    return int.from_bytes(body[-4:], "little")


def _gzip(body: bytes) -> Iterator[bytes]:
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    for at in range(0, len(body), _INPUT):
        part = body[at : at + _INPUT]
        while part:
            yield stream.decompress(part, _PIECE)
            part = stream.unconsumed_tail
    yield stream.flush()
    if not stream.eof:
        raise EOFError("it ends too early")
    if stream.unused_data:
        raise EOFError("data follow its end")


def _zstd_size(body: bytes) -> int | None:
    return zstd.get_frame_info(body).decompressed_size


def _zstd(body: bytes) -> Iterator[bytes]:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    stream = zstd.ZstdDecompressor(options=options)
    yield stream.decompress(body, _PIECE)
    while not stream.eof:
        if stream.needs_input:
            raise EOFError("it ends too early")
        yield stream.decompress(b"", _PIECE)
    if stream.unused_data:
        raise EOFError("data follow its end")


_ENCODINGS: dict[str, tuple[Callable[[bytes], int | None], Callable[[bytes], Iterator[bytes]]]] = {
    "gzip": (_gzip_size, _gzip),
    "zstd": (_zstd_size, _zstd),
}


def _known(
    encoding: str,
) -> tuple[Callable[[bytes], int | None], Callable[[bytes], Iterator[bytes]]]:
    if encoding not in _ENCODINGS:
        known = " or ".join(_ENCODINGS)
        raise UnsupportedMediaType(f"content-encoding must be {known}, not {encoding[:100]}")
    return _ENCODINGS[encoding]


def _damaged(encoding: str, why: str) -> BadRequest:
    return BadRequest(f"the {encoding} body is damaged: {why}")
