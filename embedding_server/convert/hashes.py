"""What files hold, by sha256: remembered, so that a start does not read gigabytes again.

A hash is remembered under the file's path with its size, time and inode, and holds until one of
them changes.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from embedding_server.convert.errors import ConvertError


class _Remembered(msgspec.Struct, frozen=True):
    state: tuple[int, int, int]
    sha256: str
    path: str = ""


def content_hash(path: Path, cache: Path) -> str:
    """The sha256 of a file; raises `ConvertError` where it cannot be read.

    A cache that cannot be written remembers nothing.
    """
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    memory = cache.expanduser() / "hashes" / f"{name}.json"
    try:
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ino)
        known = _recall(memory)
        if known and known.state == state:
            return known.sha256
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise ConvertError(f"{path}: {exc.strerror}") from exc
    with contextlib.suppress(OSError):
        _remember(memory, _Remembered(state, found, str(path.absolute())))
    return found


def _recall(memory: Path) -> _Remembered | None:
    try:
        return msgspec.json.decode(memory.read_bytes(), type=_Remembered)
    except (OSError, msgspec.MsgspecError):
        return None


def _remember(memory: Path, known: _Remembered) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    scratch = memory.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(msgspec.json.encode(known))
    scratch.replace(memory)
