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
