"""Files that are wanted in a second place: hard links, or copies where there can be none."""

import os
import shutil
import uuid
from pathlib import Path


def place(source: Path, target: Path) -> None:
    """Make `target` the file that `source` is, or leads to.

    It appears in one step, so several processes may do this at once. One that is there already is
    replaced unless it is the same file, or a copy of it as it is now.
    """
    source = source.resolve()
    if _version(target) == _version(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        try:
            os.link(source, scratch)
        except OSError:  # another file system, or one that has no hard links
            shutil.copy2(source, scratch)
        scratch.replace(target)
    finally:
        # It stays if another process has made `target` a link to the same file by now.
        scratch.unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int] | None:
    """Tells a file from one that was put in its place; its links and copies are equal."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns
