"""Dockerfiles before hadolint, the systemd unit before systemd-analyze."""

import re
import shutil
import subprocess

import pytest
import yaml

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
    """The CUDA image does all that the CPU image does, in its order, on a base with CUDA 13."""
    cpu, cuda = (_instructions(kind) for kind in ("cpu", "cuda"))
    rest = iter(cuda)
    assert [line for line in cpu if line not in rest] == []
    text = (ROOT / "Dockerfile.cuda").read_text()
    assert re.search(r"^ARG BASE=\S+:13\.\d+\.\d+-base-", text, re.MULTILINE)


def _instructions(kind: str) -> list[str]:
    """A Dockerfile's lines without comments, and without what names its own base and lock."""
    text = (ROOT / f"Dockerfile.{kind}").read_text()
    text = re.sub(r"^ARG BASE=\S+", "ARG BASE=...", text, flags=re.MULTILINE)
    text = text.replace(f"requirements-{kind}.lock", "requirements.lock")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_locks_are_alike() -> None:
    """Both images have the same versions; CUDA's has CUDA 13 and cuDNN."""
    cpu, cuda, build, dev = (_pinned(name) for name in ("cpu", "cuda", "build", "dev"))
    assert cpu.keys() - cuda.keys() == {"fastembed", "onnxruntime"}
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == set()
    assert {name for name, said in build.items() if dev[name] != said} == set()
    for name in ("fastembed", "onnxruntime"):
        assert cpu[name] == cuda[f"{name}-gpu"]
    assert cuda["nvidia-cuda-runtime"][0].startswith("13.")
    assert "nvidia-cudnn-cu13" in cuda


def _pinned(lock: str) -> dict[str, list[str]]:
    """The versions of every package; one may have several, for different versions of Python."""
    text = (ROOT / f"requirements-{lock}.lock").read_text()
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


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


def test_space() -> None:
    """The Space's page and its image name one port, and models are there before it is offline."""
    page = (DEPLOY / "huggingface-space" / "README.md").read_text()
    said = yaml.safe_load(page.split("---")[1])
    image = DOCKERFILES[-1].read_text()
    assert said["sdk"] == "docker"
    assert f"INFERENCE_PORT={said['app_port']} " in image
    assert f"EXPOSE {said['app_port']}\n" in image
    assert image.index("fetch --allowed") < image.index("HF_HUB_OFFLINE=1")


def test_clouds() -> None:
    """What is to be copied can be read, and the drain fits into the platform's time."""
    page = (DEPLOY / "cloud.md").read_text()
    blocks = re.findall(r"^```(?:yaml|json)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    run, ecs, azure = (yaml.safe_load(block) for block in blocks)
    defaults = Settings(allowed_embedding_models=("any",))
    template = run["spec"]["template"]["spec"]
    (container,) = template["containers"]
    drain = [int(one["value"]) for one in container["env"] if "DRAIN" in one["name"]]
    assert sum(drain) < 10_000
    assert template["timeoutSeconds"] * 1000 > defaults.request_timeout_ms
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 240
    (task,) = ecs["containerDefinitions"]
    grace = {one["name"]: one["value"] for one in task["environment"]}["INFERENCE_DRAIN_GRACE_MS"]
    assert task["stopTimeout"] * 1000 > int(grace) + defaults.drain_timeout_ms
    template = azure["properties"]["template"]
    least = defaults.drain_grace_ms + defaults.drain_timeout_ms
    assert template["terminationGracePeriodSeconds"] * 1000 > least
    assert all(one["failureThreshold"] <= 10 for one in template["containers"][0]["probes"])
