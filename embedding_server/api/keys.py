"""API keys: who may ask for what is not open to everybody, and whose turn it then is.

A key is looked up by its hash, which takes the same time however much of a wrong one is right, and
known by its name, or by a few digits of its hash where it has none: no log or metric holds a key.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from litestar.types import Scope

from embedding_server.api.middleware import OPERATIONS
from embedding_server.errors import SettingsError, Unauthorized
from embedding_server.settings import Names
from embedding_server.watch import follow

_NAME_DIGITS = 8
_NAMED = re.compile(r"([\w.@-]{1,64})=(.*[^=].*)", re.ASCII)
"""What is but `=` behind a `=` is the padding of a key in base64."""
_HASHED, _DIGEST = "sha256:", re.compile(r"[0-9a-f]{64}")
_REFUSED = "send `Authorization: Bearer <key>` or `X-API-Key: <key>` with a key of this server"


class Keys:
    """The keys that are accepted; none are asked for where there are none.

    Args:
        given: `key`, `name=key`, `name=sha256:<hex>`, or `@` and the path of a file of such lines.

    Raises:
        SettingsError: a file cannot be read or holds no key, or a key is not written so.
    """

    def __init__(self, given: Names) -> None:
        self._given = given
        self._names = self._read()

    def __repr__(self) -> str:
        return f"Keys({sorted(set(self._names.values()))})"

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
        for header, value in scope["headers"]:
            if header == b"authorization":
                kind, _, key = value.partition(b" ")
                if kind.lower() != b"bearer":
                    continue
            elif header == b"x-api-key":
                key = value
            else:
                continue
            if name := self._names.get(_digest(key.strip())):
                return name
        raise Unauthorized(_REFUSED)

    async def follow(self) -> None:
        """Read the files again when they change, for ever; without files that is nothing to do."""
        paths = [_path(one) for one in self._given if one.startswith("@")]
        if paths:
            await follow("INFERENCE_API_KEYS", paths, self._read, self._use)

    def _use(self, names: Mapping[str, str]) -> None:
        self._names = names

    def _read(self) -> Mapping[str, str]:
        """Names of keys by their hashes; raises `SettingsError`."""
        found: dict[str, str] = {}
        for at, one in enumerate(self._given, 1):
            lines = _lines(_path(one)) if one.startswith("@") else iter([(f"key {at}", one)])
            for place, line in lines:
                digest, name = _parse(place, line)
                found[digest] = name
        return found


def _parse(place: str, text: str) -> tuple[str, str]:
    """The hash and the name of a key; raises `SettingsError`, which says where, never what."""
    named = _NAMED.fullmatch(text)
    name, key = named.groups() if named else ("", text)
    if any(char.isspace() for char in key):
        raise SettingsError(f"INFERENCE_API_KEYS: {place}: a key has no spaces: one key per line")
    digest = _digest(key.encode())
    if key.startswith(_HASHED):
        digest = key.removeprefix(_HASHED).lower()
        if not _DIGEST.fullmatch(digest):
            raise SettingsError(
                f"INFERENCE_API_KEYS: {place}: 64 hexadecimal digits must follow {_HASHED}"
            )
    return digest, name or f"key-{digest[:_NAME_DIGITS]}"


def _path(given: str) -> Path:
    return Path(given[1:]).expanduser()


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each key of a file is, and what is there; raises `SettingsError`."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as exc:
        raise SettingsError(f"INFERENCE_API_KEYS: {path}: {exc}") from exc
    keys = [
        (f"{path}, line {at}", line)
        for at, whole in enumerate(text.splitlines(), 1)
        if (line := re.sub(r"(^|\s+)#.*", "", whole).strip())
    ]
    if not keys:
        raise SettingsError(f"INFERENCE_API_KEYS: {path} holds no key")
    yield from keys


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
