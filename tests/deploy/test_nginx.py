"""deploy/nginx.conf: its numbers against the settings, and Debian's nginx before real servers."""

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import httpx
import msgspec
import pytest

from benchmarks.server import free_port
from embedding_server.api.body import PART_SECONDS
from embedding_server.server import KEEP_ALIVE_SECONDS
from embedding_server.settings import Settings
from tests.deploy import DEPLOY
from tests.process import Server, server
from tests.tiny import write_model

CONFIGURATION = (DEPLOY / "nginx.conf").read_text()
DEFAULTS = Settings(allowed_embedding_models=("any",))
ADDRESS = r"172\.30\.90\.1[123]:8090"
CLIENTS, TEXTS = 8, ["the cat", "is on", "that", "a to z", "you and he"]
HEALTHY_SECONDS, AFTER_SECONDS = 4.0, 2.0
MOST_OFF = 0.2
GRACE_MS, WARMUP_MS = 700, 3000
MOST_TRIES = 8


def said(directive: str) -> str:
    """What a directive of the configuration says."""
    found = re.search(rf"^\s*{directive} (.+?);", CONFIGURATION, re.MULTILINE)
    assert found, directive
    return found[1]


def seconds(text: str) -> int:
    """`10s`."""
    return int(text.removesuffix("s"))


def test_limits_match_the_settings() -> None:
    """The server's own limits are reached first, so that it is the server that answers."""
    body = int(said("client_max_body_size").removesuffix("m")) << 20
    assert DEFAULTS.max_body_bytes < body <= DEFAULTS.max_body_bytes + (1 << 20)
    assert seconds(said("proxy_read_timeout")) * 1000 > DEFAULTS.request_timeout_ms
    assert seconds(said("client_body_timeout")) == PART_SECONDS
    idle = re.findall(r"keepalive_timeout (\w+);", CONFIGURATION)
    assert seconds(idle[0]) < KEEP_ALIVE_SECONDS, "nginx closes idle connections first"
    assert said("listen") == str(DEFAULTS.port)
    upstream = re.findall(r"^\s*server (\d\S+)", CONFIGURATION, re.MULTILINE)
    assert len(upstream) == len(re.findall(ADDRESS, CONFIGURATION)) == 3


def test_only_safe_repetitions() -> None:
    """No status is repeated, a broken connection once, and not after it ran for long."""
    assert said("proxy_next_upstream") == "error timeout non_idempotent"
    assert said("proxy_next_upstream_tries") == "2"
    longest = seconds(said("proxy_next_upstream_timeout"))
    assert seconds(said("proxy_connect_timeout")) < longest < seconds(said("proxy_read_timeout"))


class Told(msgspec.Struct):
    """What one client saw: answers by status, requests that were given up, wrong vectors."""

    statuses: Counter[int] = msgspec.field(default_factory=Counter)
    without_retry_after: int = 0
    failed: list[str] = msgspec.field(default_factory=list)
    wrong: int = 0


class Load:
    """Clients that repeat what a 503, a 502 or a broken connection did not answer.

    Args:
        url: the proxy.
        expected: what the vector of each text begins with.
    """

    def __init__(self, url: str, expected: Sequence[float]) -> None:
        self._url, self._expected = url, expected
        self._done = threading.Event()
        self.told = [Told() for _ in range(CLIENTS)]
        self._threads = [threading.Thread(target=self._client, args=(one,)) for one in self.told]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    @property
    def statuses(self) -> Counter[int]:
        """Answers so far."""
        return sum((one.statuses for one in self.told), Counter())

    def _client(self, told: Told) -> None:
        number = self.told.index(told)
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._done.is_set():
                number = (number + 1) % len(TEXTS)
                vector = self._ask(client, TEXTS[number], told)
                told.wrong += not math.isclose(vector, self._expected[number], abs_tol=1e-4)
                time.sleep(0.005)

    def _ask(self, client: httpx.Client, text: str, told: Told) -> float:
        for _ in range(MOST_TRIES):
            with suppress(httpx.TransportError):
                answer = client.post("/api/embed", json={"model": "tiny", "text": text})
                told.statuses[answer.status_code] += 1
                if answer.is_success:
                    return float(answer.json()["embeddings"][0][0])
                told.without_retry_after += "retry-after" not in answer.headers
                time.sleep(int(answer.headers.get("retry-after", 1)))
                continue
            told.statuses[0] += 1
        told.failed.append(text)
        return math.nan


@contextmanager
def nginx(directory: Path, replicas: Sequence[Server]) -> Iterator[str]:
    """Debian's nginx with the configuration as it is shipped, but for addresses; gives its own."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert binary, "install the package nginx-light"
    addresses = iter([f"127.0.0.1:{one.base_url.port}" for one in replicas])
    port = free_port()
    text = re.sub(ADDRESS, lambda _: next(addresses), CONFIGURATION)
    text = text.replace("listen 8090;", f"listen 127.0.0.1:{port};")
    text = text.replace("/tmp/", f"{directory}/").replace("/dev/stdout", f"{directory}/access.log")  # noqa: S108 - the container's
    if os.geteuid() == 0:
        text = "user root;\n" + text  # workers may write to the test's directory
    (directory / "nginx.conf").write_text(text)
    command = [binary, "-p", str(directory), "-e", "stderr", "-c", "nginx.conf"]
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    with process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def answered(replica: Server) -> float:
    """Requests that a replica embedded."""
    text = replica.get("/metrics").text
    counts = re.findall(
        r'^inference_embed_requests_total\{.*status="success"\} (\S+)', text, re.MULTILINE
    )
    return sum(map(float, counts))


def first_numbers(replica: Server) -> list[float]:
    """The first number of each text's vector."""
    answer = replica.post("/api/embed/batch", json={"model": "tiny", "texts": TEXTS})
    return [row[0] for row in answer.json()["embeddings"]]


def _imbalance(*servers: Server) -> float:
    """How far from the mean the one furthest from it is, of what each answers for a while."""
    before = [answered(one) for one in servers]
    time.sleep(HEALTHY_SECONDS)
    counts = [answered(one) - was for one, was in zip(servers, before, strict=True)]
    mean = sum(counts) / len(counts)
    return max(abs(count - mean) for count in counts) / mean


@pytest.mark.full
def test_three_replicas(tmp_path: Path) -> None:
    """One loads slowly, one is killed, one drains: clients that repeat lose nothing."""
    write_model(tmp_path / "models" / "tiny")
    flags = ["--model-path", str(tmp_path / "models"), "--allowed-embedding-models", "tiny"]
    flags += ["--threads", "1", "--drain-grace-ms", str(GRACE_MS)]
    flags += ["--log-level", "error"]  # nobody reads the log

    with ExitStack() as stack:

        def start(name: str, warmup_ms: int) -> Server:
            own = ("--cache-dir", str(tmp_path / name), "--warmup-ms", str(warmup_ms))
            return stack.enter_context(server(*flags, *own))

        killed, drained = start("a", 0), start("b", 0)
        for one in (killed, drained):
            one.until("/health/ready")
        expected = first_numbers(killed)
        slow = start("c", WARMUP_MS)
        url = stack.enter_context(nginx(tmp_path, (killed, drained, slow)))
        with Load(url, expected) as load:
            slow.until("/health/live")
            assert slow.get("/health/ready").status_code == 503, "it did not load slowly"
            slow.until("/health/ready")
            time.sleep(AFTER_SECONDS)  # those who were told to wait come back

            refused = load.statuses[503]
            off = [_imbalance(killed, drained, slow)]
            while off[-1] > MOST_OFF and len(off) < 4:  # others may want the machine's cores
                off.append(_imbalance(killed, drained, slow))
            assert load.statuses[503] == refused, "a healthy replica refused"

            killed.process.kill()
            time.sleep(AFTER_SECONDS)
            assert load.statuses[503] == refused, "a broken connection was not repeated elsewhere"

            drained.process.terminate()
            drained.process.communicate(timeout=20)
            time.sleep(AFTER_SECONDS)
            alone = answered(slow)

    assert alone
    assert drained.process.returncode == 0
    assert not [text for one in load.told for text in one.failed]
    assert sum(one.without_retry_after for one in load.told) == 0
    assert sum(one.wrong for one in load.told) == 0
    assert load.statuses.keys() <= {200, 503}
    assert min(off) <= MOST_OFF, off


@pytest.mark.full
def test_failures_of_the_proxy_itself(tmp_path: Path) -> None:
    """No replica at all is a 503 with Retry-After in our shape; /metrics and large bodies, too."""
    with nginx(tmp_path, [Server(base_url=f"http://127.0.0.1:{free_port()}")] * 3) as url:
        with httpx.Client(base_url=url, headers={"x-request-id": "mine"}) as client:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with suppress(httpx.TransportError):
                    answer = client.post("/api/embed", json={})
                    break
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["code"] == "SERVICE_UNAVAILABLE"
            assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"
            assert client.get("/metrics").json()["code"] == "NOT_FOUND"
        with closing(HTTPConnection(url.removeprefix("http://"))) as connection:
            connection.putrequest("POST", "/api/embed")
            connection.putheader("content-length", str(34 << 20))
            connection.endheaders()
            large = connection.getresponse()
            assert large.status == 413
            assert json.load(large)["code"] == "PAYLOAD_TOO_LARGE"
