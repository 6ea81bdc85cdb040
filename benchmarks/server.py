"""The real server as a process, started as users start it."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec

_START_SECONDS, _WATCH_SECONDS = 120.0, 0.1


class Server(msgspec.Struct, frozen=True):
    """A running server; `start_seconds` from process start to ready."""

    url: str
    pid: int
    start_seconds: float

    @contextlib.contextmanager
    def peak_mb(self) -> Iterator[list[float]]:
        """A list whose only element becomes the highest resident memory, MiB."""
        peak, done = [self.resident_mb], threading.Event()

        def watch() -> None:
            while not done.wait(_WATCH_SECONDS):
                peak[0] = max(peak[0], self.resident_mb)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()

    @property
    def resident_mb(self) -> float:
        """Resident memory, MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    @property
    def texts(self) -> float:
        """Texts embedded so far."""
        return sum(map(float, _samples(self.url, r"inference_embed_items_total\{.*\}")))


@contextlib.contextmanager
def demo_server(*flags: str, log: int = subprocess.DEVNULL) -> Iterator[Server]:
    """`serve --demo`; yields it once it is ready. `log` is where its log goes."""
    command = [sys.executable, "-m", "embedding_server", "serve", "--demo"]
    command += ["--hostname", "127.0.0.1", "--drain-grace-ms", "0", *flags]
    with started(command, "/health/ready", out=log) as server:
        yield server


@contextlib.contextmanager
def started(
    command: Sequence[str],
    ready: str,
    *,
    out: int = subprocess.DEVNULL,
    err: int | None = None,
) -> Iterator[Server]:
    """A server on a free port, once its path `ready` answers 200."""
    port, began = free_port(), time.monotonic()
    process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=err)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url + ready, process)
        yield Server(url, process.pid, time.monotonic() - began)
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).is_success:
                return
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        time.sleep(0.02)
    raise RuntimeError(f"{url} did not answer within {_START_SECONDS:.0f} s")


def tokens_served(url: str) -> float:
    """Real tokens the server has run so far."""
    return sum(map(float, _samples(url, r"inference_tokens_total\{.*\}")))


def gauge(url: str, name: str) -> float:
    """The value of a metric without labels."""
    (value,) = _samples(url, name)
    return float(value)


def median_run_seconds(url: str, work: Callable[[], object]) -> float:
    """The median length of the model runs during `work`, interpolated between buckets."""
    before = _run_buckets(url)
    work()
    counts = {edge: count - before.get(edge, 0.0) for edge, count in _run_buckets(url).items()}
    half, lower, below = max(counts.values()) / 2, 0.0, 0.0
    for edge, count in sorted(counts.items()):
        if count >= half:
            return lower + (edge - lower) * (half - below) / (count - below)
        lower, below = edge, count
    raise RuntimeError("no model run was seen")


def _run_buckets(url: str) -> dict[float, float]:
    found = re.findall(
        r'^inference_run_seconds_bucket\{.*le="([^"]+)".*\} (\S+)$', _metrics(url), re.MULTILINE
    )
    return {float(edge): float(count) for edge, count in found}


def _samples(url: str, pattern: str) -> list[str]:
    return re.findall(rf"^{pattern} (\S+)$", _metrics(url), re.MULTILINE)


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text
