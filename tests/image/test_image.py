"""`Dockerfile.cpu`, really built and run: `make image-test`.

It needs root, Debian's buildah and mmdebstrap, and util-linux, but no container engine and no
registry: the base image is made here, under the tag that the Dockerfile names.
"""

import os
import re
import signal
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from tests.catalog.test_discover import files_of
from tests.hub import LocalHub
from tests.image.sandbox import OWN, Running, running
from tests.image.store import ROOT, build, buildah, container, described, size
from tests.tiny import write_model

pytestmark = [pytest.mark.image, pytest.mark.timeout(1200)]

TAG, BAKED, CONTEXT = (f"embedding-server:image-test{what}" for what in ("", "-baked", "-context"))
MOST_BYTES = 700_000_000
REPOSITORY = "some/body"


@pytest.fixture(scope="module")
def image() -> str:
    """The image, built; its base too if it is not there."""
    build(TAG, VERSION="1.2.3", REVISION="abc")
    return TAG


@pytest.fixture(scope="module")
def config(image: str) -> dict[str, Any]:
    """How the image says it is run."""
    said: dict[str, Any] = described(image)["Docker"]["config"]
    return said


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory with the model `tiny`, that every user may read."""
    model = write_model(tmp_path / "own" / "tiny")
    (model / "model.safetensors").chmod(0o644)
    return model.parent


def test_what_it_says(config: dict[str, Any]) -> None:
    """The entry point is the server itself, without a shell and without root."""
    assert config["Entrypoint"] == ["embedding-server"]
    assert config["Cmd"] == ["serve"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "embedding-server", "healthcheck"]
    assert list(config["Volumes"]) == ["/cache"]
    assert list(config["ExposedPorts"]) == ["8090/tcp"]
    labels = {name.rpartition(".")[2]: said for name, said in config["Labels"].items()}
    assert labels["title"] == "embedding-server"
    assert labels["licenses"] == "MIT"
    assert labels["version"] == "1.2.3"
    assert labels["revision"] == "abc"


def test_its_size(image: str) -> None:
    """It is small enough."""
    assert size(image) < MOST_BYTES


def test_what_is_installed(image: str) -> None:
    """The lock's versions and the server, nothing else; neither sources nor a package manager."""
    lock = (ROOT / "requirements-cpu.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    everywhere = set(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock, re.MULTILINE))
    with container(image) as (_, root):
        (packages,) = (root / "opt/venv/lib").glob("python3*/site-packages")
        found = {
            (re.sub(r"[-_.]+", "-", one.name).lower(), one.version)
            for one in distributions(path=[str(packages)])
        }
        assert not (root / "src").exists()
        assert not list((root / "opt").glob("pip"))
    (server,) = found - pinned
    assert server[0] == "embedding-server"
    assert everywhere <= found


def test_context(tmp_path: Path) -> None:
    """`.dockerignore` lets in what the Dockerfiles copy, and nothing else."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    buildah("build", f"--tag={CONTEXT}", f"--file={dockerfile}", str(ROOT))
    texts = [path.read_text() for path in ROOT.glob("Dockerfile.*")]
    copied = {
        word
        for text in texts
        for line in re.findall(r"^COPY ([^-].*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    with container(CONTEXT) as (_, root):
        assert {path.name for path in root.iterdir()} == copied
        assert not list(root.rglob("__pycache__"))


def test_it_serves(image: str, config: dict[str, Any], own: Path, tmp_path: Path) -> None:
    """Process 1 is the server, as its user; it is healthy, answers, and ends well at SIGTERM.

    All of that on a read-only root directory: it needs no file but those in /cache and /tmp.
    """
    env = {"INFERENCE_ALLOWED_EMBEDDING_MODELS": "tiny", "INFERENCE_MODEL_PATH": OWN}
    with container(image) as (_, root), running(config, root, own, tmp_path, **env) as server:
        assert server.writable() == {"/cache", "/tmp", "/proc"}  # noqa: S108 - the container's
        assert server.status("NSpid") == [str(server.pid), "1"]
        assert server.status("Uid") == ["10001"] * 4
        assert server.status("CapEff") == ["0" * 16]
        words = Path(f"/proc/{server.pid}/cmdline").read_bytes().decode().split("\0")
        assert words[1:3] == ["/opt/venv/bin/embedding-server", "serve"]
        _embed(server, "tiny")
        check = config["Healthcheck"]
        server.inside(*check["Test"][1:], seconds=check["Timeout"] / 1e9)
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
    assert list((tmp_path / "cache").rglob("*.onnx"))


def _embed(server: Running, model: str) -> None:
    answer = server.post("/api/embed", json={"model": model, "text": "the of and"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["dimensions"] == 32


def test_baked_in(config: dict[str, Any], image: str, own: Path, tmp_path: Path) -> None:
    """Models of the build argument are served without a hub."""
    with LocalHub() as hub:
        hub.publish(REPOSITORY, files_of(own / "tiny"), lfs=("model.safetensors",))
        build(BAKED, MODELS=REPOSITORY, HF_ENDPOINT=hub.url)
    env = {"INFERENCE_ALLOWED_EMBEDDING_MODELS": REPOSITORY, "HF_HOME": "/models"}
    with (
        container(BAKED) as (_, root),
        running(config, root, own, tmp_path, HF_HUB_OFFLINE="1", **env) as server,
    ):
        _embed(server, REPOSITORY)
