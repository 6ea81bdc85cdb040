"""API keys: who may ask for what is not open to everybody, and whose turn it then is.

Keys are compared by their hashes, which takes the same time however much of a wrong one is right.
Logs and metrics have their names, or a few digits of their hashes: never a key.
"""

import hashlib
import re
from pathlib import Path

from litestar.types import Scope

from embedding_server.api.middleware import OPERATIONS, header
from embedding_server.errors import SettingsError, Unauthorized
from embedding_server.settings import Names

_NAME_DIGITS = 8
_NAMED = re.compile(r"([\w.-]{1,64})=([^=].*)", re.ASCII)
"""A key that ends in `=` has no name."""
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class Keys:
    """The keys that are accepted; none are asked for where there are none.

    Args:
        given: keys, `name=key`, either with `sha256:` and the hash in place of the key, or `@` and
            the path of a file with one per line.

    Raises:
        SettingsError: a file cannot be read, or holds no key.
    """

    def __init__(self, given: Names) -> None:
        keys = [key for one in given for key in (_lines(one[1:]) if one.startswith("@") else [one])]
        self._names = dict(map(_named, keys))
        """By their hashes."""

    def __repr__(self) -> str:
        return f"Keys({sorted(self._names.values())})"

    def caller(self, scope: Scope) -> str | None:
        """The name of the key that a request has; None where no key is needed.

        Raises:
            Unauthorized: it needs one and has none that is accepted.
        """
        if (
            not self._names
            or scope["path"].startswith(OPERATIONS)
            or scope.get("method") == "OPTIONS"
        ):
            return None
        kind, _, key = header(scope, b"authorization").partition(" ")
        if kind.lower() != "bearer":
            key = header(scope, b"x-api-key")
        name = self._names.get(_digest(key.strip())) if key else None
        if name is None:
            raise Unauthorized(
                "send `Authorization: Bearer <key>` or `X-API-Key: <key>` with a key of this server"
            )
        return name


def _named(given: str) -> tuple[str, str]:
    """The hash of a key, and its name."""
    match = _NAMED.fullmatch(given)
    name, key = match.groups() if match else ("", given)
    hashed = _HASHED.fullmatch(key)
    digest = hashed[1] if hashed else _digest(key)
    return digest, name or f"key-{digest[:_NAME_DIGITS]}"


def _lines(path: str) -> list[str]:
    try:
        keys = Path(path).expanduser().read_text().split()
    except (OSError, UnicodeError) as exc:
        raise SettingsError(f"INFERENCE_API_KEYS: {path}: {exc}") from exc
    if not keys:
        raise SettingsError(f"INFERENCE_API_KEYS: {path} holds no key")
    return keys


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
