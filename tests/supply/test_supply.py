"""Locks have hashes, the package runs no code of its files, and nobody is told what it does."""

import ast
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest

from benchmarks.server import free_port
from embedding_server import __version__
from embedding_server.conversion import _reference
from embedding_server.errors import StartupError
from embedding_server.serving.references import stored
from tests.process import environment
from tests.supply import IMAGES, LOCKS, ROOT, pinned, rounds

PACKAGE = ROOT / "embedding_server"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.relative_to(ROOT)))
def test_every_line_has_hashes(lock: Path) -> None:
    """Each package is pinned to one version and to its files' hashes, and to no index."""
    lines = lock.read_text().replace("\\\n", "").splitlines()
    assert lines
    for line in lines:
        package = r"[\w.-]+(\[[\w,-]+\])?==[^\s;]+ *(; [^#]*?)?( +--hash=sha256:[0-9a-f]{64})+"
        assert re.fullmatch(package, line), line


def test_hashes_are_checked() -> None:
    """Whatever installs from a lock checks hashes; what builds the package is in one.

    TensorRT, which is in no lock, is pinned by a build argument that may have its hash.
    """
    for path in (ROOT / "Makefile", *ROOT.glob("Dockerfile.*")):
        text = path.read_text().replace("\\\n", " ")
        installs = re.findall(r"pip (?:--python \S+ )?install (.*? (?:-r|--requirement) .*)", text)
        installs = [one for one in installs if "tensorrt.txt" not in one]
        assert installs, path
        assert all("--require-hashes" in one and "--no-deps" in one for one in installs), path
        builds = re.findall(r"pip (?:wheel|install) .* \.(?:\s|$)", text)
        assert builds, path
        assert all("--no-build-isolation" in one for one in builds), path


BANNED = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}
"""Modules that run what a file says; torch's own loader is one of them."""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Whatever in a module could run code out of data."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in BANNED)
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            yield node.arg
        elif isinstance(node, ast.Constant) and node.value in ("allow_pickle", "trust_remote_code"):
            yield str(node.value)
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"):
                yield called


def test_no_code_out_of_data() -> None:
    """No pickles, no remote code, no loader of YAML that makes objects: in no module of ours."""
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    found = {path: list(unsafe(ast.parse(path.read_text()))) for path in modules}
    assert {str(path): one for path, one in found.items() if one} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch.serialization import load",
        "np.load(path, allow_pickle=True)",
        "f(**{'trust_remote_code': True})",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_code_out_of_data_would_be_seen(line: str) -> None:
    """What the test above looks for it finds."""
    assert list(unsafe(ast.parse(line)))


class Payload:
    """What a pickle of it does when it is read: it raises."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('a pickle was read')",)


def test_pickles_in_archives(tmp_path: Path) -> None:
    """Both readers of npz files leave an object in them alone."""
    content = io.BytesIO()
    np.savez(content, ids=np.array([Payload()]), arr_0=np.array([Payload()]))
    path = tmp_path / "evil.npz"
    path.write_bytes(content.getvalue())
    with pytest.raises(SystemExit):
        pickle.loads(pickle.dumps(Payload()))  # noqa: S301 - it would be noticed
    assert stored(path, [np.zeros(1, np.float32)]) is None
    with pytest.raises(StartupError, match="no npz file that can be read"):
        _reference(path)


TELLTALE = """
import sys, ipaddress
def hook(event, given):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        print("SOCKET", event, given[:2], flush=True)
sys.addaudithook(hook)
from embedding_server.cli import main
main()
"""
"""A server that says whom it turns to, and what names it looks up."""


def test_nobody_is_told(tmp_path: Path) -> None:
    """A server that starts, works and ends connects to nobody and looks up no name but its own."""
    port = str(free_port())
    flags = ["serve", "--demo", "--hostname", "127.0.0.1", "--port", port]
    process = subprocess.Popen(
        [sys.executable, "-c", TELLTALE, *flags],
        env=environment(HF_HOME=str(tmp_path), INFERENCE_CACHE_DIR=str(tmp_path / "cache")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=10)) as client:
            while not client.get("/health/ready").is_success:
                assert process.poll() is None
            body = {"model": "sentence-transformers/all-MiniLM-L6-v2", "input": ["a"] * 3}
            assert client.post("/api/embed", json=body).is_success
            assert client.get("/metrics").is_success
        process.terminate()
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    seen = {line for line in said.splitlines() if line.startswith("SOCKET")}
    assert seen
    assert all(line.startswith("SOCKET socket.getaddrinfo ('127.0.0.1'") for line in seen), seen


@contextmanager
def advisories(status: int, vulnerable: str = "") -> Iterator[str]:
    """The address of an OSV of our own, to which one package is known."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            package = asked["package"]
            events = [{"introduced": "0"}, {"fixed": "9999"}]
            ranges = [{"type": "ECOSYSTEM", "events": events}]
            known = {"id": "OSV-1", "affected": [{"package": package, "ranges": ranges}]}
            found = {"vulns": [known]} if package["name"] == vulnerable else {}
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hub.server_port}"
        hub.shutdown()


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m tests.supply`."""
    command = [sys.executable, "-m", "tests.supply", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_rounds() -> None:
    """Versions of one package are asked about one after the other."""
    packages = [("a", "1"), ("a", "2"), ("b", "1")]
    assert rounds(packages) == [[("a", "1"), ("b", "1")], [("a", "2")]]
    assert sorted(one for some in rounds(pinned(LOCKS)) for one in some) == pinned(LOCKS)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_audit() -> None:
    """A known vulnerability fails it; a source that cannot be asked is said, and does not."""
    count = len(pinned(LOCKS))
    with advisories(200) as url:
        said = run("audit", "--osv-url", url)
        expected = f"{count} of {count} packages audited: 0 known vulnerabilities\n"
        assert (said.returncode, said.stdout) == (0, expected), said.stderr
    with advisories(200, "msgspec") as url:
        said = run("audit", "--osv-url", url)
        assert said.returncode == 1
        assert re.search(r"^msgspec [\d.]+: OSV-1, mended in 9999\n", said.stdout), said.stdout
    with advisories(503) as url:
        said = run("audit", "--osv-url", url)
        assert (said.returncode, said.stdout) == (0, f"not audited: {url} is out of reach\n")
    closed = f"http://127.0.0.1:{free_port()}"
    said = run("audit", "--osv-url", closed)
    assert (said.returncode, said.stdout) == (0, f"not audited: {closed} is out of reach\n")
    with advisories(400) as url:
        assert run("audit", "--osv-url", url).returncode == 1


@pytest.mark.full
def test_sbom(tmp_path: Path) -> None:
    """Both images' packages, with versions and hashes, and our own version, in CycloneDX's form."""
    assert run("sbom", "--directory", str(tmp_path)).returncode == 0
    for kind, lock in IMAGES.items():
        bill = json.loads((tmp_path / f"sbom-{kind}.json").read_bytes())
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        assert bill["metadata"]["component"]["name"] == "embedding-server"
        assert bill["metadata"]["component"]["version"] == __version__
        found = {(one["name"], one["version"]) for one in bill["components"]}
        assert found == set(pinned([lock]))
        for one in bill["components"]:
            assert one["externalReferences"][0]["hashes"][0]["alg"] == "SHA-256"
