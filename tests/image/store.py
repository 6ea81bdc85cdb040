"""Images in buildah's store: made, described, mounted. Nothing here waits without an end."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile.cpu"
FROM_HOST = os.environ.get("IMAGE_TEST_MOUNTS", "/etc/ssl/certs:/etc/pip.conf").split(":")
"""What a build needs to reach a package index the way this machine does, as far as it is here."""


def call(*command: str, seconds: float = 60, env: dict[str, str] | None = None) -> str:
    """What a command prints; it and whatever it started end with the call, and in time."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        finally:
            end(process)
    assert process.returncode == 0, f"{command}: {process.returncode}\n{said[-3000:]}"
    return said.strip()


def end(process: "subprocess.Popen[Any]") -> None:
    """Kill what is left of a process that leads a session, and of all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def buildah(*args: str, seconds: float = 60) -> str:
    """What a command of buildah prints; chroot is the isolation that needs no other program."""
    env = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    return call("buildah", *args, seconds=seconds, env=env)


def build(tag: str, **arguments: str) -> None:
    """Build `Dockerfile.cpu`, in layers as Docker does: what has not changed is not built again."""
    base = re.search(r"^ARG BASE=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert base
    if base[1] not in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        _make_base(base[1])
    options = [f"--volume={path}:{path}:ro" for path in FROM_HOST if Path(path).exists()]
    options += [f"--build-arg={name}={value}" for name, value in arguments.items()]
    options += ["--pull=never", "--layers", "--format=docker", f"--tag={tag}"]
    buildah("build", *options, f"--file={DOCKERFILE}", str(ROOT), seconds=900)


def _make_base(name: str) -> None:
    """Debian at its smallest, and certificates: a build can't add them where the host's are."""
    suite = re.search(r":(\w+)-", name)
    assert suite
    options = ["--quiet", "--variant=minbase", "--include=ca-certificates"]
    with container("scratch") as (made, root):
        call("mmdebstrap", *options, suite[1], str(root), seconds=600)
        buildah("commit", "--quiet", made, name, seconds=300)


@contextmanager
def container(image: str) -> Iterator[tuple[str, Path]]:
    """A container of the image: its name, and where its files are."""
    name = buildah("from", "--pull=never", image)
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)


def described(image: str) -> dict[str, Any]:
    """What the image says of itself."""
    said: dict[str, Any] = json.loads(buildah("inspect", "--type=image", image))
    return said


def size(image: str) -> int:
    """Bytes of all its layers, unpacked."""
    return sum(layer["size"] for layer in json.loads(described(image)["Manifest"])["layers"])
