"""The server as a real process on a real socket."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.server import free_port

COMMAND = [sys.executable, "-m", "embedding_server", "serve"]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without settings, plus `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("INFERENCE_")}
    return kept | changes


class Server(httpx.Client):
    """A running server process and a client of it."""

    process: "subprocess.Popen[str]"

    def until(self, path: str, seconds: float = 30.0) -> httpx.Response:
        """The first successful answer of `path`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if (answer := self.get(path)).is_success:
                    return answer
            time.sleep(0.02)
        raise AssertionError(f"{path} did not succeed; status {self.process.poll()}")


@contextmanager
def server(*flags: str, cwd: Path | None = None, **env: str) -> Iterator[Server]:
    """`serve` with these flags and variables on a free port; ends it by pid."""
    port = free_port()
    process = subprocess.Popen(
        [*COMMAND, "--hostname", "127.0.0.1", "--port", str(port), *flags],
        env=environment(**env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with Server(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        client.process = process
        with process:
            try:
                yield client
            finally:
                process.kill()
