"""`embedding-server cache`: what lies in `INFERENCE_CACHE_DIR`, and removing it.

Everything there is made again when it is wanted. Only what is called as the server calls its own
files is looked at, and nothing that a link leads to elsewhere.
"""

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from embedding_server.convert import GraphOrigin
from embedding_server.errors import StartupError
from embedding_server.settings import Settings
from embedding_server.table import show

_OURS = re.compile(r"[0-9a-f]{32}(\.\w+)?|\.(building|removed)-\w+")
_COLUMNS = ("name", "kind", "MB", "made", "model", "architecture")
_DAY = 86_400


class _Entry(msgspec.Struct, frozen=True):
    """A thing in the cache; `made` is in seconds since 1970."""

    name: str
    kind: str
    path: Path
    made: float
    model: str = ""
    architecture: str = ""


def show_cache(settings: Settings) -> None:
    """Print a line for everything that is cached, the oldest first."""
    lines = [_COLUMNS]
    for one in _entries(settings.cache_dir):
        made = datetime.fromtimestamp(one.made, UTC)
        cells = (one.name, one.kind, _megabytes([one]), f"{made:%Y-%m-%d %H:%M}")
        lines.append((*cells, one.model or "-", one.architecture or "-"))
    show(lines)


def prune(settings: Settings, names: Sequence[str], *, all_: bool, days: float | None) -> None:
    """Remove what is named as `show_cache` names it, or by its model; or all; or what is older.

    Raises:
        StartupError: not exactly one of these is said, nothing is called so, or it cannot be
            removed.
    """
    if [bool(names), all_, days is not None].count(True) != 1:
        raise StartupError(
            "cache rm: name what `cache ls` shows, or say --all or --older-than DAYS"
        )
    entries = list(_entries(settings.cache_dir))
    if names:
        known = {word for one in entries for word in (one.name, one.model)}
        if unknown := [name for name in names if name not in known]:
            raise StartupError(f"cache rm: `cache ls` shows no {unknown[0]}")
        entries = [one for one in entries if not {one.name, one.model}.isdisjoint(names)]
    if days is not None:
        entries = [one for one in entries if one.made < time.time() - days * _DAY]
    freed = _megabytes(entries)
    for one in entries:
        _remove(one.path)
        print(f"removed {one.name}")
    print(f"freed {freed} MB")


def _entries(cache: Path) -> Iterator[_Entry]:
    """What is cached, the oldest first."""
    root = cache.expanduser()
    found = [
        look(path)
        for folder, look in FOLDERS.items()
        if (root / folder).resolve() == root.resolve() / folder
        for path in (root / folder).glob("*")
        if _OURS.fullmatch(path.name) and not path.is_symlink()
    ]
    yield from sorted(found, key=lambda one: (one.made, one.name))


def _graph(path: Path) -> _Entry:
    origin, name = GraphOrigin.read(path), f"graphs/{path.name}"
    if path.name.startswith("."):
        return _Entry(name, "unfinished", path, path.stat().st_mtime)
    if not origin:
        return _Entry(name, "graph", path, path.stat().st_mtime)
    return _Entry(
        name,
        "graph" if origin.model else "projections",
        path,
        origin.converted.timestamp(),
        origin.model or origin.directory,
        f"{origin.architecture} {origin.precision}" if origin.model else "",
    )


def _file(kind: str, key: str = "") -> Callable[[Path], _Entry]:
    """A file, which may say under `key` what it is of."""

    def look(path: Path) -> _Entry:
        said = None
        with suppress(OSError, msgspec.MsgspecError):
            said = msgspec.json.decode(path.read_bytes(), type=dict) if key else None
        name = f"{path.parent.name}/{path.name}"
        return _Entry(name, kind, path, path.stat().st_mtime, str((said or {}).get(key) or ""))

    return look


FOLDERS: Mapping[str, Callable[[Path], _Entry]] = {
    "graphs": _graph,
    "profiles": _file("profile", "model"),
    "references": _file("reference"),
    "calibrations": _file("calibration"),
    "engines": _file("engine"),
    "hashes": _file("hash", "path"),
}


def _megabytes(entries: Iterable[_Entry]) -> str:
    """What removing them all frees: a file that has a link elsewhere frees nothing."""
    sizes, links = {}, Counter[tuple[int, int]]()
    for path in (file for one in entries for file in (one.path, *one.path.rglob("*"))):
        if not path.is_dir():
            status = path.lstat()
            key = status.st_dev, status.st_ino
            links[key] += 1
            sizes[key] = status.st_size, status.st_nlink
    freed = sum(size for key, (size, wanted) in sizes.items() if links[key] >= wanted)
    return f"{freed / 1e6:.1f}"


def _remove(path: Path) -> None:
    """In one step, as far as a server that starts now can see."""
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        gone = path.with_name(f".removed-{path.name.rpartition('-')[2]}")
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as exc:
        raise StartupError(f"cache rm: {path}: {exc.strerror}") from exc
