"""`embedding-server healthcheck`, as a container runs it."""

import subprocess
import sys
from pathlib import Path

from benchmarks.server import free_port
from tests.process import environment, server

COMMAND = [sys.executable, "-m", "embedding_server", "healthcheck"]


def healthcheck(port: int, **env: str) -> "subprocess.CompletedProcess[str]":
    """One check of a server at this port."""
    settings = environment(INFERENCE_PORT=str(port), **env)
    return subprocess.run(
        COMMAND, check=False, env=settings, capture_output=True, text=True, timeout=30
    )


def test_a_server_that_serves() -> None:
    """It says nothing, without importing what the server consists of."""
    with server("--demo") as demo:
        demo.until("/health/ready")
        port = demo.base_url.port
        assert port
        ended = healthcheck(port)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        loaded = subprocess.run(
            [sys.executable, "-X", "importtime", *COMMAND[1:]],
            env=environment(INFERENCE_PORT=str(port)),
            check=True,
            capture_output=True,
            text=True,
        )
    for large in ("numpy", "onnxruntime", "litestar", "structlog"):
        assert f" {large}\n" not in loaded.stderr


def test_nobody_there() -> None:
    """It is one line and status 1."""
    ended = healthcheck(free_port())
    assert ended.returncode == 1
    assert "does not answer" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_server_that_is_not_ready(tmp_path: Path) -> None:
    """The reasons are on stderr."""
    flags = ("--hf-endpoint", f"http://127.0.0.1:{free_port()}", "--hf-home", str(tmp_path))
    with server("--allowed-embedding-models", "BAAI/bge-small-en-v1.5", *flags) as waiting:
        waiting.until("/health/live")
        port = waiting.base_url.port
        assert port
        ended = healthcheck(port)
    assert ended.returncode == 1
    assert "is not ready: 503" in ended.stderr
    assert "bge-small-en-v1.5" in ended.stderr
