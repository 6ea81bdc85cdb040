"""Dockerfiles before hadolint, the systemd unit before systemd-analyze."""

import re
import shutil
import subprocess

import pytest

from embedding_server.settings import Settings
from tests.deploy import DEPLOY, ROOT, tool

DOCKERFILES = [*ROOT.glob("Dockerfile.*"), DEPLOY / "huggingface-space" / "Dockerfile"]
UNIT = DEPLOY / "embedding-server.service"
MOST_EXPOSED = 20
"""Of 100; what systemd-analyze calls OK ends at 50."""


@pytest.mark.full
def test_dockerfiles() -> None:
    """Hadolint has nothing to say, but for what .hadolint.yaml ignores and why."""
    command = [tool("hadolint"), "--no-color", "--config", str(ROOT / ".hadolint.yaml")]
    said = subprocess.run(
        [*command, *map(str, DOCKERFILES)], check=False, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout
    assert not said.stdout


def test_images_are_alike() -> None:
    """Both images run the same way: what follows their layers is the same."""
    cpu, cuda = ((ROOT / f"Dockerfile.{kind}").read_text() for kind in ("cpu", "cuda"))
    assert cpu.split("\nUSER ")[1] == cuda.split("\nUSER ")[1]
    assert re.search(r"^ARG BASE=\S+:13\.\d+\.\d+-base-", cuda, re.MULTILINE)
    lock = (ROOT / "requirements-cuda.lock").read_text()
    assert re.search(r"^nvidia-cuda-runtime==13\.", lock, re.MULTILINE)
    assert re.search(r"^nvidia-cudnn-cu13==", lock, re.MULTILINE)


def test_unit_has_time_to_drain() -> None:
    """Systemd waits for longer than the server drains, and does not repeat wrong settings."""
    text = UNIT.read_text()
    settings = Settings(allowed_embedding_models=("any",))
    wait = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert wait
    assert int(wait[1]) * 1000 > settings.drain_grace_ms + settings.drain_timeout_ms
    assert "\nRestartPreventExitStatus=2\n" in text


def test_unit_is_hardened() -> None:
    """Systemd knows every line, and finds little exposed."""
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    command = [analyze, "security", "--offline=true", f"--threshold={MOST_EXPOSED}", str(UNIT)]
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout[-500:] + said.stderr
    verified = subprocess.run(
        [analyze, "verify", "--man=no", str(UNIT)], check=False, capture_output=True, text=True
    )
    lines = [line for line in verified.stderr.splitlines() if "is not executable" not in line]
    assert not lines
