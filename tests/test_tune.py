"""`embedding-server bench tune` as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import environment

COMMAND = [sys.executable, "-m", "embedding_server", "bench", "tune", "--seconds", "0.01"]


def tune(*flags: str) -> "subprocess.CompletedProcess[str]":
    """Run it with these flags."""
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, env=environment(), check=False
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tune(models: Path, tmp_path: Path, precision: str) -> None:
    """It shows progress and what is worth choosing from, and keeps the best for `serve`."""
    model = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    ran = tune(*model, "--cache-dir", str(tmp_path), "--threads", "2", "--precision", precision)
    assert ran.returncode == 0, ran.stderr
    assert "tokens/s" in ran.stdout
    assert "per run, spinning" in ran.stdout
    assert "100%" in ran.stderr
    (stored,) = tmp_path.glob("profiles/*.json")
    assert f"in {stored}" in ran.stdout
    assert ("cosine" in stored.read_text()) == (precision == "int8")


def test_unknown_model(models: Path) -> None:
    """What keeps it from starting is one line."""
    ran = tune("--model-path", str(models), "--allowed-embedding-models", "nothing")
    assert ran.returncode == 2
    assert "nothing" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
