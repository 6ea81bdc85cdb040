"""One commit of a published repository, as far as it lies in the cache that huggingface-hub keeps.

`files` looks here before it asks the hub. Nothing here opens a socket. The layout is
`<cache>/models--<owner>--<name>/snapshots/<commit>/<file>`, each file a link into `blobs/`, where
it is called by its hash.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import RepoFile, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from embedding_server.catalog.description import CONFIGURATION, ESSENTIAL
from embedding_server.convert.links import place
from embedding_server.settings import Names

__all__ = ["Snapshot", "folder", "real_files"]

_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


def folder(repo: str) -> str:
    """What the cache calls a repository."""
    return f"models--{repo.replace('/', '--')}"


class Snapshot(msgspec.Struct, frozen=True):
    """The files of one commit that are cached.

    `listing` has every file the commit has, by name; None where an older client made the cache.
    """

    directory: Path
    listing: Mapping[str, RepoFile] | None

    @classmethod
    def read(cls, repo: str, directory: Path) -> "Snapshot":
        """What is known about a directory below `snapshots/`."""
        cache, commit = directory.parents[2], directory.name
        try:
            files = get_cached_repo_tree(repo, revision=commit, cache_dir=cache)
        except CachedRepoTreeNotFoundError:
            return cls(directory, None)
        return cls(directory, {file.path: file for file in files})

    @property
    def configuration(self) -> Names:
        """The configuration that was published; a guess where that is not known."""
        if self.listing is None:
            return ESSENTIAL
        return tuple(name for name in CONFIGURATION if name in self.listing)

    @property
    def present(self) -> frozenset[str]:
        """Names of the files that are there, whole or not."""
        paths = (path for path in self.directory.rglob("*") if path.is_file())
        return frozenset(path.relative_to(self.directory).as_posix() for path in paths)

    @property
    def names(self) -> frozenset[str]:
        """Names of the files that the commit has; those that are there where that is not known."""
        return self.present if self.listing is None else frozenset(self.listing)

    def exists(self, name: str) -> bool:
        """Whether a file is there, whole or not."""
        return (self.directory / name).is_file()

    def has(self, name: str) -> bool:
        """Whether a file is there in its full size."""
        if not self.exists(name):
            return False
        published = (self.listing or {}).get(name)
        return not published or published.size == (self.directory / name).stat().st_size

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Those that are there, but not as they were published; reads all of them."""
        return [
            name
            for name in filter(self.exists, names)
            if not (self.has(name) and self._has_its_hash(name))
        ]

    def drop(self, name: str) -> None:
        """Forget a file, so that it is downloaded again."""
        path = self.directory / name
        for there in (path.resolve(), path):
            there.unlink(missing_ok=True)

    def _has_its_hash(self, name: str) -> bool:
        """Whether the content is what the blob's name says.

        That is the sha256 of a large file, git's hash of any other. A mirror may call its files
        as it likes: a name that is no such hash says nothing.
        """
        path = self.directory / name
        blob = path.readlink().name if path.is_symlink() else ""
        published = (self.listing or {}).get(name)
        if _SHA256.fullmatch(blob):
            return blob == _digest(path, hashlib.sha256())
        if _SHA1.fullmatch(blob) and (not published or published.blob_id == blob):
            header = b"blob %d\0" % path.stat().st_size
            return blob == _digest(path, hashlib.sha1(header, usedforsecurity=False))
        return True


def real_files(directory: Path, names: Iterable[str], target: Path) -> Path:
    """Hard links, or copies, in `target` of files that are links in `directory`.

    Several processes may do this at once.
    """
    for name in names:
        place(directory / name, target / name)
    return target


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()
