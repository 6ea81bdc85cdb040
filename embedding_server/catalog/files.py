"""The files of published models: out of the hub's cache, else downloaded; never a damaged one.

A model that has an `Origin` passes here before it is loaded for the first time. The cache is the
one that all programs with huggingface-hub share, `<HF_HOME>/hub`, or `<HF_HOME>` itself as old
ones had it. What is complete there is taken without asking: no socket is opened, and a revision
that is not pinned stays what it was when it was fetched.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from embedding_server.catalog.description import CONFIGURATION
from embedding_server.catalog.local import FilesError
from embedding_server.catalog.snapshot import Snapshot, folder, real_files
from embedding_server.core import Origin

__all__ = ["FilesError", "Hub"]

_NEWEST = "main"
_TRIES = 2
_ANSWER_SECONDS = 10.0
_PASSING = (ConnectionError, TimeoutError, FileNotFoundError)
"""Not this machine's fault, or another process cleaned up at this moment."""


class Hub:
    """The hub as this process may use it. Its methods block.

    Args:
        home: HF_HOME.
        endpoint: a mirror; None is what the library takes for the hub.
        token: for private repositories.
        offline: open no socket, what is cached must do.
        progress: draw progress bars, on a terminal.
    """

    def __init__(
        self,
        home: Path,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        offline: bool = False,
        progress: bool = False,
    ) -> None:
        self._home = home.expanduser()
        self._caches = (self._home / "hub", self._home)
        # False, for with None the library looks for a token by itself.
        self._access: dict[str, Any] = {
            "endpoint": endpoint.rstrip("/") if endpoint else None,
            "token": token or False,
        }
        # The library refuses to connect, whatever we say, where its own variable forbids it.
        self._offline = offline or constants.HF_HUB_OFFLINE
        # Something to call: the library takes it for a class of bars.
        self._bars: Any = None if progress else partial(tqdm, disable=True)
        # It would ask huggingface.co, whatever the endpoint, what to report about its caller.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        # Its warnings are in the process's log already; its own handler repeats them on stderr.
        logging.getLogger("huggingface_hub").handlers.clear()

    @property
    def offline(self) -> bool:
        """Whether only what is cached can be had."""
        return self._offline

    def __repr__(self) -> str:
        return f"Hub({str(self._home)!r}, offline={self._offline})"

    def fetch(self, origin: Origin, *, check: bool = False) -> Path:
        """A directory with all of `origin.files`, and what there is of `CONFIGURATION`.

        Where a model is more than one file these are real files, not links into the cache: ONNX
        Runtime refuses external data that a link takes out of the model's directory.

        Args:
            origin: what is wanted.
            check: hash what is cached, and fetch again what is damaged.

        Raises:
            FilesError: they cannot be had.
        """
        with _explained(origin):
            snapshot = self._complete(origin, check=check) or self._download(origin)
            if len(origin.files) == 1:
                return snapshot.directory
            names = filter(snapshot.exists, (*origin.files, *CONFIGURATION))
            target = self._home / "hub-links" / folder(origin.repo).removeprefix("models--")
            return real_files(snapshot.directory, names, target / snapshot.directory.name)

    def configuration(self, origin: Origin, *, ask: bool = False) -> Snapshot:
        """The commit with what there is of `CONFIGURATION`; nothing else is downloaded.

        Args:
            origin: what is wanted, without files.
            ask: the hub, even if all of it is cached; the listing of the files is then known.

        Raises:
            FilesError: it cannot be had.
        """
        with _explained(origin):
            cached = None if ask else self._complete(origin)
            return cached or self._download(origin)

    def cached(self, origin: Origin) -> bool:
        """Whether `fetch` would not need the network.

        Raises:
            FilesError: the cache cannot be read.
        """
        with _explained(origin):
            return self._complete(origin) is not None

    def verify(self, origin: Origin) -> list[str]:
        """Names of the cached files that are not what was published, by size or by hash.

        Raises:
            FilesError: the cache cannot be read.
        """
        names = (*origin.files, *CONFIGURATION)
        with _explained(origin):
            found = [name for one in self._snapshots(origin) for name in one.damaged(names)]
        return list(dict.fromkeys(found))

    def _snapshots(self, origin: Origin) -> Iterator[Snapshot]:
        """The wanted commit, wherever it is cached."""
        for cache in self._caches:
            repository = cache / folder(origin.repo)
            commit = origin.revision or _NEWEST
            with contextlib.suppress(OSError):
                commit = (repository / "refs" / commit).read_text().strip()
            directory = repository / "snapshots" / commit
            if directory.is_dir():
                yield Snapshot.read(origin.repo, directory)

    def _complete(self, origin: Origin, *, check: bool = False) -> Snapshot | None:
        for snapshot in self._snapshots(origin):
            # Programs that fetched less configuration could do without; offline we must, too.
            needed = () if self._offline else snapshot.configuration
            names = {*origin.files, *needed, *filter(snapshot.exists, CONFIGURATION)}
            if all(map(snapshot.has, names)) and not (check and snapshot.damaged(names)):
                return snapshot
        return None

    def _download(self, origin: Origin) -> Snapshot:
        """Fetch what is missing, and once more what is damaged."""
        repo, files = origin.repo, ", ".join(origin.files) or "its configuration"
        if self._offline:
            raise FilesError(
                f"{repo}: {files} not in {self._home}, or damaged, and HF_HUB_OFFLINE is set: fill"
                " it with `embedding-server fetch` where there is a network",
                retry=False,
            )
        for _ in range(_TRIES):
            snapshot = Snapshot.read(repo, self._ask(origin))
            if missing := [name for name in origin.files if not snapshot.exists(name)]:
                raise FilesError(
                    f"{repo} has no {', '.join(missing)} in revision {origin.revision or _NEWEST}:"
                    " check the names",
                    retry=False,
                )
            damaged = snapshot.damaged((*origin.files, *CONFIGURATION))
            if not damaged:
                return snapshot
            for name in damaged:
                snapshot.drop(name)
        raise FilesError(
            f"{repo}: {', '.join(damaged)} arrived damaged: check HF_ENDPOINT and proxies",
            retry=True,
        )

    def _ask(self, origin: Origin) -> Path:
        """Let the library download what is not cached; returns its directory."""
        # Only this request takes a time limit. Those that the library makes before it downloads
        # have none: a hub that accepts connections and does not answer would hold us for ever.
        HfApi(**self._access).model_info(
            origin.repo, revision=origin.revision, timeout=_ANSWER_SECONDS
        )
        present = [cache for cache in self._caches if (cache / folder(origin.repo)).is_dir()]
        return Path(
            snapshot_download(
                origin.repo,
                revision=origin.revision,
                cache_dir=[*present, self._caches[0]][0],
                allow_patterns=[*origin.files, *CONFIGURATION],
                tqdm_class=self._bars,
                **self._access,
            )
        )


@contextlib.contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Turn whatever the library raises into a `FilesError`."""
    try:
        yield
    # ValueError: an answer that is no JSON. RuntimeError: the library's transfers in Rust.
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as exc:
        raise _failure(origin, exc) from exc


def _failure(origin: Origin, exc: BaseException) -> FilesError:
    repo = origin.repo
    match exc:
        case LocalEntryNotFoundError(__cause__=BaseException() as cause):
            return _failure(origin, cause)
        case HFValidationError():
            text, retry = f"{repo!r} is no repository's name: it is owner/name", False
        case GatedRepoError():
            text, retry = f"{repo} is restricted: accept its terms there and set HF_TOKEN", False
        case RevisionNotFoundError():
            text, retry = f"{repo} has no revision {origin.revision or _NEWEST}", False
        case HfHubHTTPError(response=httpx.Response(status_code=401 | 403 | 404 as status)):
            text = f"{repo} does not exist or is private (HTTP {status}): check it, or set HF_TOKEN"
            retry = False
        case HfHubHTTPError(response=httpx.Response(status_code=status)):
            text = f"{repo}: the hub answered HTTP {status}: check HF_ENDPOINT"
            retry = status >= 500 or status in (408, 429)
        case OSError(errno=int()) if not isinstance(exc, _PASSING):
            text, retry = f"{repo}: {exc}: check HF_HOME", False
        case _:
            why = " ".join(f"{type(exc).__name__}: {exc}".split())
            text, retry = f"{repo}: {why}: check the network and HF_ENDPOINT", True
    return FilesError(text, retry=retry)
