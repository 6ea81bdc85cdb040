"""The real server as a process, started as users start it."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx


@contextlib.contextmanager
def demo_server() -> Iterator[str]:
    """`serve --demo` on a free port; yields its address once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "embedding_server", "serve", "--demo"]
    command += ["--hostname", "127.0.0.1", "--port", str(port), "--drain-grace-ms", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready").is_success:
                return
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        time.sleep(0.1)
    raise RuntimeError("the server was not ready within 60 s")


def tokens_served(url: str) -> float:
    """Real tokens the server has run so far."""
    text = httpx.get(f"{url}/metrics").text
    return sum(map(float, re.findall(r"^inference_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)))


@contextlib.contextmanager
def mean_run_seconds(url: str) -> Iterator[list[float]]:
    """A list that holds the mean length of the model runs in the block, once it has ended."""
    result: list[float] = []
    before = _runs(url)
    yield result
    seconds, count = (after - start for after, start in zip(_runs(url), before, strict=True))
    result.append(seconds / count)


def _runs(url: str) -> tuple[float, float]:
    text = httpx.get(f"{url}/metrics").text
    found = dict(re.findall(r"^inference_run_seconds_(sum|count)\{.*\} (\S+)$", text, re.MULTILINE))
    return float(found["sum"]), float(found["count"])
