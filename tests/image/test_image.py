"""`Dockerfile.cpu`, really built and run: `make image-test`.

It needs root and Debian's buildah and mmdebstrap, but no container engine and no registry: the base
image is made here, under the tag that the Dockerfile names.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process import free_port
from tests.tiny import write_model

pytestmark = [pytest.mark.image, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parent.parent.parent
TAG = "embedding-server:image-test"
UID = 10001
MOST_BYTES = 700_000_000
WRITABLE = ("cache", "tmp")
FROM_HOST = os.environ.get("IMAGE_TEST_MOUNTS", "/etc/ssl/certs:/etc/pip.conf").split(":")
"""What a build needs to reach a package index the way this machine does, as far as it is here."""


def buildah(*args: str) -> str:
    """What a command of buildah prints."""
    command = ["buildah", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, built; its base too if it is not there."""
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    base = re.search(r"^ARG BASE=(\S+)", (ROOT / "Dockerfile.cpu").read_text(), re.MULTILINE)
    assert base
    if base[1] not in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        _make_base(base[1], tmp_path_factory.mktemp("base") / "base.tar")
    mounts = [f"--volume={path}:{path}:ro" for path in FROM_HOST if Path(path).exists()]
    options = ["--pull=never", "--format=docker", "--build-arg=VERSION=1.2.3", *mounts]
    buildah("build", *options, "-f", str(ROOT / "Dockerfile.cpu"), "-t", TAG, str(ROOT))
    return TAG


def _make_base(name: str, archive: Path) -> None:
    suite = re.search(r":(\w+)-", name)
    assert suite
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", suite[1], str(archive)], check=True
    )
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(archive), "/")
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)


@pytest.fixture(scope="module")
def config(image: str) -> dict[str, Any]:
    """What the image says of itself."""
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))
    docker: dict[str, Any] = found["Docker"]
    return docker


def test_what_it_says(config: dict[str, Any]) -> None:
    """The entry point is the server itself, without a shell and without root."""
    said = config["config"]
    assert said["Entrypoint"] == ["embedding-server"]
    assert said["Cmd"] == ["serve"]
    assert said["User"] == f"{UID}:{UID}"
    assert said["StopSignal"] == "SIGTERM"
    assert said["Healthcheck"]["Test"] == ["CMD", "embedding-server", "healthcheck"]
    assert list(said["Volumes"]) == ["/cache"]
    assert list(said["ExposedPorts"]) == ["8090/tcp"]
    assert said["Labels"]["org.opencontainers.image.version"] == "1.2.3"


def test_its_size(image: str) -> None:
    """It is small enough."""
    assert _size(image) < MOST_BYTES


def _size(image: str) -> int:
    (found,) = json.loads(buildah("images", "--json", image))
    number, unit = re.fullmatch(r"([\d.]+) ([KMG]?B)", found["size"]).groups()  # type: ignore[union-attr]
    return int(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit])


@contextmanager
def container(image: str) -> Iterator[tuple[str, Path]]:
    """A container of the image, and where its root directory is."""
    name = buildah("from", "--pull=never", image)
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)


def test_it_serves(image: str, config: dict[str, Any], tmp_path: Path) -> None:
    """It answers as uid 10001, is healthy, ends at SIGTERM and leaves no file where it may not."""
    write_model(tmp_path / "tiny")
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)  # safetensors writes files for their owner alone
    port = free_port()
    with container(image) as (name, root):
        started = time.time()
        env = {
            "INFERENCE_ALLOWED_EMBEDDING_MODELS": "tiny",
            "INFERENCE_MODEL_PATH": "/own",
            "INFERENCE_PORT": str(port),
            "INFERENCE_DRAIN_GRACE_MS": "100",
        }
        options = [f"--env={key}={value}" for key, value in env.items()]
        options += [f"--volume={tmp_path}:/own:ro"]
        entry = config["config"]["Entrypoint"] + config["config"]["Cmd"]
        with subprocess.Popen(["buildah", "run", *options, name, "--", *entry]) as process:
            _until_ready(process, port)
            body = {"model": "tiny", "text": "the of and"}
            answer = httpx.post(f"http://127.0.0.1:{port}/api/embed", json=body)
            assert answer.status_code == 200
            assert answer.json()["dimensions"] > 0
            check = config["config"]["Healthcheck"]["Test"][1:]
            buildah("run", *options, name, "--", *check)
            (pid,) = [
                one for one in _processes() if _environ(one).get("INFERENCE_PORT") == str(port)
            ]
            assert Path(f"/proc/{pid}").stat().st_uid == UID
            os.kill(pid, signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        assert _written(root, started) == []
        assert list((root / "cache").rglob("*.onnx"))


def _until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    for _ in range(600):
        assert process.poll() is None
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("not ready within a minute")


def _processes() -> list[int]:
    """Processes that run the server's command with Python."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"python" in words[0] and any(word.endswith(b"/embedding-server") for word in words):
            found.append(int(path.name))
    return found


def _environ(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _written(root: Path, since: float) -> list[Path]:
    """Files that were written outside of what is writable."""
    kept = [root / name for name in (*WRITABLE, "proc", "sys", "dev", "run", "own")]
    found = []
    for path in root.rglob("*"):
        if any(path == one or one in path.parents for one in kept) or path.is_symlink():
            continue
        if path.is_file() and path.stat().st_mtime >= since:
            found.append(path)
    return found
