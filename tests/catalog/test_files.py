"""Published files: the real client of the hub against a hub on loopback."""

import multiprocessing
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedding_server.catalog import files as module
from embedding_server.catalog.files import FilesError, Hub
from embedding_server.core import Origin
from tests.hub import TOKEN, Fault, LocalHub

REPO, GRAPH, DATA = "tiny/model", "onnx/model.onnx", "onnx/model.onnx_data"
MIB = 1 << 20
FILES = {
    GRAPH: b"a graph " * 1000,
    DATA: b"weights" * 1000,
    "config.json": b"{}",
    "tokenizer.json": b'{"words": []}',
    "1_Pooling/config.json": b'{"pooling": "mean"}',
    "README.md": b"read me",
    "pytorch_model.bin": b"a pickle",
}
WANTED = {GRAPH, "config.json", "tokenizer.json", "1_Pooling/config.json"}
ORIGIN = Origin(repo=REPO, files=(GRAPH,))
BOTH = Origin(repo=REPO, files=(GRAPH, DATA))

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test asks for an address that is not this machine's."""
    resolve, hosts = socket.getaddrinfo, set()

    def seen(host: Any, *args: Any, **kwargs: Any) -> Any:
        hosts.add(host)
        return resolve(host if host == "localhost" else "127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", seen)
    yield
    assert hosts <= {"127.0.0.1", "localhost"}


@pytest.fixture
def local() -> Iterator[LocalHub]:
    """A hub that has `FILES`."""
    with LocalHub() as hub:
        hub.publish(REPO, FILES, lfs=(GRAPH, DATA))
        yield hub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two attempts."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def hub(local: LocalHub, tmp_path: Path) -> Hub:
    """A client of the local hub with an empty cache."""
    return Hub(tmp_path, endpoint=local.url)


def names(directory: Path) -> set[str]:
    """All files below a directory."""
    paths = directory.rglob("*")
    return {path.relative_to(directory).as_posix() for path in paths if path.is_file()}


def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on whoever connects, or sends over an open connection, fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was used")

    for method in ("connect", "connect_ex", "send", "sendall"):
        monkeypatch.setattr(socket.socket, method, refuse)


def pinned(local: LocalHub, position: int = -1) -> Origin:
    """The graph of one commit."""
    return Origin(
        repo=REPO, files=(GRAPH,), revision=list(local.repositories[REPO].commits)[position]
    )


def test_only_what_is_needed(hub: Hub, local: LocalHub, capfd: pytest.CaptureFixture[str]) -> None:
    """The named file and the configuration are downloaded, once each, and nothing is printed."""
    assert not hub.cached(ORIGIN)
    directory = hub.fetch(ORIGIN)
    assert names(directory) == WANTED
    assert all((directory / name).read_bytes() == FILES[name] for name in WANTED)
    assert [len(local.downloads(name)) for name in (GRAPH, "tokenizer.json")] == [1, 1]
    assert not local.downloads("README.md")
    assert hub.cached(ORIGIN)
    assert hub.verify(ORIGIN) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("offline", [False, True])
def test_cached_means_no_socket(
    hub: Hub, local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool
) -> None:
    """What is cached, by its newest revision or by its commit, is had without the network."""
    first = hub.fetch(ORIGIN)
    no_sockets(monkeypatch)
    again = Hub(tmp_path, endpoint=local.url, offline=offline)
    for origin in (ORIGIN, pinned(local)):
        assert again.cached(origin)
        assert again.fetch(origin) == first


def test_offline_without_a_cache(
    local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, what is not cached is said not to be; no socket is opened to find out."""
    no_sockets(monkeypatch)
    hub = Hub(tmp_path, endpoint=local.url, offline=True)
    with pytest.raises(
        FilesError, match=f"{REPO}: {GRAPH} not in .*embedding-server fetch"
    ) as info:
        hub.fetch(ORIGIN)
    assert not info.value.retry
    assert not hub.cached(ORIGIN)


def test_revisions(hub: Hub, local: LocalHub) -> None:
    """A commit is what it was; the newest one is looked up once and then stays."""
    local.publish(REPO, FILES | {GRAPH: b"newer"}, lfs=[GRAPH])
    assert (hub.fetch(pinned(local, 0)) / GRAPH).read_bytes() == FILES[GRAPH]
    assert (hub.fetch(ORIGIN) / GRAPH).read_bytes() == b"newer"
    local.publish(REPO, FILES | {GRAPH: b"newest"}, lfs=[GRAPH])
    assert (hub.fetch(ORIGIN) / GRAPH).read_bytes() == b"newer"
    assert (hub.fetch(pinned(local)) / GRAPH).read_bytes() == b"newest"


def test_private_repositories(
    local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that was given, no other one, opens what is private; a CDN does not see it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    origin = Origin(repo="tiny/secret", files=(GRAPH,))
    local.publish(origin.repo, FILES, lfs=[GRAPH], private=True)
    for token in (None, "wrong"):
        with pytest.raises(FilesError, match="tiny/secret .* is private .* HF_TOKEN") as info:
            Hub(tmp_path, endpoint=local.url, token=token).fetch(origin)
        assert not info.value.retry
    assert names(Hub(tmp_path, endpoint=local.url, token=TOKEN).fetch(origin)) == WANTED
    (download,) = local.downloads(GRAPH)
    assert download.path.startswith("/cdn/")
    assert download.authorization is None


def test_gated_repositories(local: LocalHub, tmp_path: Path) -> None:
    """What is listed for everybody, but not for everybody to download."""
    origin = Origin(repo="tiny/gated", files=(GRAPH,))
    local.publish(origin.repo, FILES, lfs=[GRAPH], gated=True)
    with pytest.raises(FilesError, match="tiny/gated is restricted: .* HF_TOKEN") as info:
        Hub(tmp_path, endpoint=local.url).fetch(origin)
    assert not info.value.retry
    assert names(Hub(tmp_path, endpoint=local.url, token=TOKEN).fetch(origin)) == WANTED


def test_a_broken_transfer_is_resumed(hub: Hub, local: LocalHub, impatient: None) -> None:
    """A connection that ends too early is followed by one that asks for the rest."""
    graph = bytes(range(256)) * (11 * MIB // 256)
    local.publish(REPO, FILES | {GRAPH: graph}, lfs=[GRAPH])
    local.fault(GRAPH, Fault.BREAK, times=1)
    assert (hub.fetch(ORIGIN) / GRAPH).read_bytes() == graph
    # The library writes 10 MiB at a time; what it had of the next ones is lost.
    assert [request.bytes for request in local.downloads(GRAPH)] == [None, f"bytes={10 * MIB}-"]


def test_a_transfer_that_always_breaks(
    hub: Hub, local: LocalHub, tmp_path: Path, impatient: None
) -> None:
    """It is given up, may be tried again later, and half a file is not mistaken for one."""
    local.fault(GRAPH, Fault.BREAK)
    with pytest.raises(FilesError, match=f"{REPO}: .*peer closed.* HF_ENDPOINT") as info:
        hub.fetch(ORIGIN)
    assert info.value.retry
    assert not hub.cached(ORIGIN)
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json"])
def test_wrong_bytes_are_fetched_again(hub: Hub, local: LocalHub, name: str) -> None:
    """A large file and a small one whose content is not what its hash says."""
    local.fault(name, Fault.WRONG, times=1)
    assert (hub.fetch(ORIGIN) / name).read_bytes() == FILES[name]
    assert len(local.downloads(name)) == 2


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json"])
def test_bytes_that_are_always_wrong(hub: Hub, local: LocalHub, name: str) -> None:
    """They are not returned, now or from the cache."""
    local.fault(name, Fault.WRONG)
    with pytest.raises(FilesError, match=f"{REPO}: {name} arrived damaged") as info:
        hub.fetch(ORIGIN)
    assert info.value.retry
    assert len(local.downloads(name)) == 2
    assert not hub.cached(ORIGIN)


def truncate(path: Path) -> None:
    """Half of it is lost."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit is another one."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json"])
@pytest.mark.parametrize(("damage", "seen"), [(truncate, True), (flip, False)])
def test_damage_in_the_cache(
    hub: Hub, local: LocalHub, tmp_path: Path, *, name: str, damage: Damage, seen: bool
) -> None:
    """Every fetch sees a wrong size; a wrong content is seen by those that check."""
    path = hub.fetch(ORIGIN) / name
    damage(path)
    assert hub.verify(ORIGIN) == [name]
    assert hub.cached(ORIGIN) is not seen
    offline = Hub(tmp_path, offline=True)
    with pytest.raises(FilesError, match="or damaged, and HF_HUB_OFFLINE"):
        offline.fetch(ORIGIN, check=not seen)
    hub.fetch(ORIGIN, check=not seen)
    assert path.read_bytes() == FILES[name]
    assert len(local.downloads(name)) == 2
    assert hub.verify(ORIGIN) == []


def test_an_unreachable_hub(local: LocalHub, tmp_path: Path) -> None:
    """Nobody listens: worth another try, with and without a pinned commit."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub = Hub(tmp_path, endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}/")
        for origin in (ORIGIN, pinned(local)):
            with pytest.raises(FilesError, match=f"{REPO}: ConnectError.*HF_ENDPOINT") as info:
                hub.fetch(origin)
            assert info.value.retry
            assert "\n" not in str(info.value)


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is accepted and left alone ends."""
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = Hub(tmp_path, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(FilesError, match=f"{REPO}: ReadTimeout") as info:
            hub.fetch(ORIGIN)
    assert info.value.retry


@pytest.mark.parametrize("path", ["/api/models", "/tree/", GRAPH])
def test_a_hub_in_trouble(hub: Hub, local: LocalHub, impatient: None, path: str) -> None:
    """Status 500, to any of the requests, is worth another try."""
    local.fault(path, Fault.ERROR)
    with pytest.raises(FilesError, match=f"{REPO}: the hub answered HTTP 500") as info:
        hub.fetch(ORIGIN)
    assert info.value.retry


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        (Origin(repo="tiny/none", files=(GRAPH,)), "tiny/none does not exist or is private"),
        (Origin(repo="a/b/c", files=(GRAPH,)), "'a/b/c' is no repository's name"),
        (Origin(repo=REPO, files=("no.onnx",)), f"{REPO} has no no.onnx in revision main"),
        (Origin(repo=REPO, files=(GRAPH,), revision="v2"), f"{REPO} has no revision v2"),
        (Origin(repo=REPO, files=(GRAPH,), revision="0" * 40), f"{REPO} has no revision 000"),
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_what_does_not_exist(
    local: LocalHub, tmp_path: Path, origin: Origin, text: str, token: str | None
) -> None:
    """No later try would help, and the message says what is wrong."""
    hub = Hub(tmp_path, endpoint=local.url, token=token)
    with pytest.raises(FilesError, match=text) as info:
        hub.fetch(origin)
    assert not info.value.retry
    assert "\n" not in str(info.value)


def test_a_home_that_cannot_be_written(local: LocalHub, tmp_path: Path) -> None:
    """A mistake on this machine is named, and trying again does not mend it."""
    (tmp_path / "hub").write_text("a file, where a directory should be")
    with pytest.raises(FilesError, match=f"{REPO}: .*{tmp_path}.*HF_HOME") as info:
        Hub(tmp_path, endpoint=local.url).fetch(ORIGIN)
    assert not info.value.retry


def test_old_caches(
    hub: Hub, local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What older programs left, one level higher and without a list of files, is found there."""
    hub.fetch(ORIGIN)
    (folder,) = (tmp_path / "hub").glob("models--*")
    old = folder.rename(tmp_path / folder.name)
    shutil.rmtree(old / "trees")
    shutil.rmtree(tmp_path / "hub")
    with monkeypatch.context() as patched:
        no_sockets(patched)
        assert names(Hub(tmp_path).fetch(ORIGIN)) == WANTED
    flip(hub.fetch(ORIGIN) / GRAPH)
    assert hub.verify(ORIGIN) == [GRAPH]
    assert (hub.fetch(ORIGIN, check=True) / GRAPH).read_bytes() == FILES[GRAPH]
    assert not list((tmp_path / "hub").glob("models--*"))


def test_what_other_programs_fetched(
    hub: Hub, local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration that they left out is fetched as well; offline it is done without."""
    directory = hub.fetch(ORIGIN)
    (directory / "1_Pooling" / "config.json").unlink()
    assert not hub.cached(ORIGIN)
    with monkeypatch.context() as patched:
        no_sockets(patched)
        offline = Hub(tmp_path, offline=True).fetch(ORIGIN)
        assert names(offline) == WANTED - {"1_Pooling/config.json"}
    assert names(hub.fetch(ORIGIN)) == WANTED
    assert len(local.downloads(GRAPH)) == 1


def test_external_data_are_real_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph and its weights lie in one directory, cost no disk space, and are reused."""
    directory = hub.fetch(BOTH)
    assert directory.parent == tmp_path / "hub-links" / "tiny--model"
    assert names(directory) == WANTED | {DATA}
    paths = [directory / name for name in names(directory)]
    assert not any(path.is_symlink() for path in paths)
    assert all(path.stat().st_nlink == 2 for path in paths)
    no_sockets(monkeypatch)
    monkeypatch.setattr("os.link", no_sockets)
    assert hub.fetch(BOTH) == directory


def test_real_files_follow_the_cache(hub: Hub) -> None:
    """What was damaged and is fetched again is not taken from where it was linked to."""
    path = hub.fetch(BOTH) / DATA
    flip(path)
    assert hub.verify(BOTH) == [DATA]
    assert hub.fetch(BOTH, check=True) == path.parent.parent
    assert path.read_bytes() == FILES[DATA]


def test_copies_where_there_are_no_hard_links(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other file systems the files are copied, once."""

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    path = hub.fetch(BOTH) / DATA
    made = path.stat()
    assert (made.st_nlink, path.read_bytes()) == (1, FILES[DATA])
    hub.fetch(BOTH)
    assert path.stat().st_ino == made.st_ino


def fetched(home: Path, url: str) -> tuple[Path, bytes]:
    """What another process does."""
    directory = Hub(home, endpoint=url).fetch(BOTH)
    return directory, (directory / DATA).read_bytes()


@pytest.mark.parametrize("several", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_several_at_once(local: LocalHub, tmp_path: Path, several: Callable[..., Executor]) -> None:
    """Threads, or processes, that want the same have the same, whole, and leave nothing behind."""
    spawn = multiprocessing.get_context("spawn")
    more = {"mp_context": spawn} if several is ProcessPoolExecutor else {}
    with several(4, **more) as pool:
        tasks = [pool.submit(fetched, tmp_path, local.url) for _ in range(4)]
        results = [task.result() for task in tasks]
    directory = results[0][0]
    assert results == [(directory, FILES[DATA])] * 4
    assert names(directory) == WANTED | {DATA}
    assert len(local.downloads(DATA)) == 1
