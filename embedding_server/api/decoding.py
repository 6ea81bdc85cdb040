"""A body's JSON to the struct that a handler takes, at a cost that its length bounds well.

A value takes two bytes to write, and a hundred once it is an object: 30 MB of `[],` took 1.3 GB and
8 s of the event loop. So values are counted before any of them is made.
"""

import gc
import re
from typing import Any

import msgspec

from embedding_server.errors import BadRequest, PayloadTooLarge

_MOST_VALUES = 1 << 19
"""In one body. OpenAI takes 300,000 token ids; of other values some thousands are many."""
_VALUE = re.compile(r"^(Invalid (?:enum )?value) .*?( - at `\$[^`]*`)?$", re.DOTALL)
"""What msgspec says of a value that is none of those allowed: all of it but the value."""


def decoded(body: bytes | bytearray, target: Any) -> Any:
    """The JSON `body` as a `target`.

    Raises:
        BadRequest: it is no JSON, or not of that type.
        PayloadTooLarge: it has too many values.
    """
    if len(body) > _MOST_VALUES and _commas(body) >= _MOST_VALUES:
        raise PayloadTooLarge(
            f"the body has over {_MOST_VALUES} values: send fewer texts or ids per request"
        )
    gc.disable()  # nothing of it is garbage yet, and looking for some took five times the decoding
    try:
        return msgspec.json.decode(body, type=target)
    except RecursionError as exc:
        raise BadRequest("the JSON is nested too deeply") from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        fault = _VALUE.sub(r"\1\2", str(exc))
        raise BadRequest(f"the JSON body cannot be used: {fault}") from exc
    finally:
        gc.enable()


def _commas(body: bytes | bytearray) -> int:
    """Commas between values, or some lower number than `_MOST_VALUES` if there are fewer."""
    commas = body.count(b",")
    if commas < _MOST_VALUES:  # even with those in texts
        return commas
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # all quotation marks end a string
    if plain.count(b'"') > 2 * _MOST_VALUES:
        return commas
    return sum(part.count(b",") for part in plain.split(b'"')[::2])
