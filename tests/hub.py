"""A hub of our own on loopback: as much of its HTTP API as the real client asks for."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import msgspec

TOKEN = "hf_secret"  # noqa: S105 - it opens nothing but a LocalHub
"""What opens private repositories."""


class Fault(StrEnum):
    """What goes wrong with an answer."""

    BREAK = "the connection ends in the middle of the body"
    WRONG = "the body has other bytes, as many as it should"
    ERROR = "the status is 500"


class Request(msgspec.Struct, frozen=True):
    """One request as it came in; `bytes` is its Range header."""

    method: str
    path: str
    bytes: str | None
    authorization: str | None


class Blob(msgspec.Struct, frozen=True):
    """A file's content, and how the hub stores it."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        """Names a large file."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name, of a large file's pointer if it is one."""
        stored = f"oid sha256:{self.sha256}".encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        """The name the client keeps it under."""
        return self.sha256 if self.lfs else self.oid


class Repository(msgspec.Struct):
    """Every commit of a repository, oldest first; the last one is `main`.

    Without a token a `private` one cannot be seen, and a `gated` one cannot be downloaded.
    """

    private: bool
    gated: bool
    commits: dict[str, dict[str, Blob]] = {}

    def commit(self, revision: str) -> str | None:
        """The commit that a revision means."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class LocalHub:
    """A context manager; `requests` are all that came in while it was open."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self._faults: dict[tuple[str, Fault], float] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """What HF_ENDPOINT would say."""
        return f"http://127.0.0.1:{self.port}"

    def publish(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        lfs: Collection[str] = (),
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Make these files the newest commit; returns its hash."""
        blobs = {name: Blob(content, name in lfs) for name, content in files.items()}
        repository = self.repositories.setdefault(repo, Repository(private, gated))
        said = [f"{name} {blob.etag}" for name, blob in blobs.items()]
        text = repr((repo, len(repository.commits), said))
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = blobs
        return commit

    def fault(self, name: str, fault: Fault, times: float = math.inf) -> None:
        """Let the next `times` answers go wrong whose path has `name` in it."""
        self._faults[name, fault] = times

    def takes(self, path: str, fault: Fault) -> bool:
        """Whether this answer is to go wrong; counts it."""
        for key, times in self._faults.items():
            if key[1] is fault and key[0] in path and times:
                self._faults[key] = times - 1
                return True
        return False

    def downloads(self, name: str) -> list[Request]:
        """The requests for the content of a file."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and request.path.endswith(f"/{name}")
        ]


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; a connection carries no second one."""

    def do_GET(self) -> None:
        """Answer by path."""
        hub, path = self._hub, unquote(urlsplit(self.path).path)
        seen = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        hub.requests.append(seen)
        if hub.takes(path, Fault.ERROR):
            self._refuse(500, "")
        elif path.startswith("/cdn/"):
            self._cdn(path)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._resolve(repo, revision, name)

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""

    @property
    def _hub(self) -> LocalHub:
        hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        return hub

    @property
    def _allowed(self) -> bool:
        return bool(self.headers["Authorization"] == f"Bearer {TOKEN}")

    def _api(self, path: str) -> None:
        words = path.split("/")
        repo, what, revision = "/".join(words[:2]), *[*words[2:4], "revision", "main"][:2]
        if not (found := self._commit(repo, revision)):
            return
        commit, files = found
        if what == "tree":
            self._json([_entry(name, blob) for name, blob in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": commit, "siblings": siblings})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if not (found := self._commit(repo, revision)):
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if self._hub.repositories[repo].gated and not self._allowed:
            self._refuse(403, "GatedRepo")
        elif not (blob := files.get(name)):
            self._refuse(404, "EntryNotFound", headers)
        elif blob.lfs:
            # Another host, as far as the client can tell: it must not see the token.
            location = f"http://localhost:{self._hub.port}/cdn/{blob.sha256}/{name}"
            size = str(len(blob.content))
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": size}
            self._answer(302, b"", headers | linked | {"Location": location})
        else:
            self._content(blob, headers | {"ETag": f'"{blob.oid}"'})

    def _cdn(self, path: str) -> None:
        digest, _, name = path.removeprefix("/cdn/").partition("/")
        for repository in self._hub.repositories.values():
            for files in repository.commits.values():
                if name in files and files[name].sha256 == digest:
                    self._content(files[name], {})
                    return
        self._refuse(404, "")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]] | None:
        """What is asked for; None: it was refused, in the hub's way."""
        repository = self._hub.repositories.get(repo)
        if not self._allowed and (not repository or repository.private):
            # Whoever may not see a repository does not learn whether it exists.
            self._refuse(401, "")
        elif not repository:
            self._refuse(404, "RepoNotFound")
        elif commit := repository.commit(revision):
            return commit, repository.commits[commit]
        else:
            self._refuse(404, "RevisionNotFound")
        return None

    def _content(self, blob: Blob, headers: dict[str, str]) -> None:
        first = int((self.headers["Range"] or "bytes=0-")[6:-1])
        body, size = blob.content[first:], len(blob.content)
        if self.command == "GET" and self._hub.takes(self.path, Fault.WRONG):
            body = bytes(byte ^ 1 for byte in body)
        if first:
            headers |= {"Content-Range": f"bytes {first}-{size - 1}/{size}"}
        self._answer(206 if first else 200, body, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"", {**(headers or {}), **({"X-Error-Code": code} if code else {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            broken = self._hub.takes(self.path, Fault.BREAK)
            self.wfile.write(body[: len(body) * 15 // 16] if broken else body)


def _entry(name: str, blob: Blob) -> dict[str, object]:
    """A file in the listing of a commit."""
    size = len(blob.content)
    entry = {"type": "file", "path": name, "size": size, "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": 130}
    return entry
