"""The server as a process: start, signals, mistakes."""

import gzip
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from benchmarks.server import free_port
from tests.process import COMMAND, Server, environment, server

DEMO = "sentence-transformers/all-MiniLM-L6-v2"


def start(*flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """A start of the server that is expected to end by itself."""
    return subprocess.run(
        [*COMMAND, *flags],
        env=environment(**env),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("flags", "env", "status", "said"),
    [
        ([], {}, 2, "INFERENCE_ALLOWED_EMBEDDING_MODELS is not set"),
        (["--demo", "--port", "0"], {}, 2, "INFERENCE_PORT='0': expected a number from 1 to 65535"),
        (["--demo"], {"INFERENCE_PORT": "tcp://10.0.0.1:8090"}, 2, "Kubernetes Service"),
        (["--demo"], {"INFERENCE_PRELOAD": "nope"}, 2, "the model is in no allow-list"),
        (["--demo", "--allowed-rerank-models", "all-MiniLM-L6"], {}, 2, "did you mean Xenova/all-"),
        (["--demo", "--hostname", "a..b"], {}, 1, "cannot listen on a..b"),
        (["--demo", "--allowed-rerank-models", "Qdrant/bm25"], {}, 2, "which cannot rerank"),
        (["--demo", "--ssl-enabled"], {}, 2, "set TLS_SERVER_CERT_PATH and TLS_SERVER_KEY_PATH"),
        (["--demo", "--ssl-enabled", "--tls-cert-path", "/x", "--tls-key-path", "/y"], {}, 1,
         "TLS_SERVER_CERT_PATH='/x', TLS_SERVER_KEY_PATH='/y': [Errno 2] No such file"),
        (["--demo", "--max-loaded-models", "1", "--model-path", "{models}", "--preload",
          f"{DEMO},tiny", "--allowed-embedding-models", f"{DEMO},tiny"], {}, 2,
         "INFERENCE_PRELOAD names 2 models, but INFERENCE_MAX_LOADED_MODELS=1"),
        (["--demo", "--hostname", "no.such.host.invalid"], {}, 1, "cannot listen on no.such.host"),
    ],
)  # fmt: skip
def test_start_up_mistakes_are_one_line(
    models: Path, flags: list[str], env: dict[str, str], status: int, said: str
) -> None:
    """A mistake is one line on stderr and the documented exit status, never a traceback."""
    ended = start(*(flag.format(models=models) for flag in flags), **env)
    assert ended.returncode == status
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_port_in_use() -> None:
    """A port that is taken is one line and exit status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--demo", "--hostname", "127.0.0.1", "--port", str(taken.getsockname()[1])]
        ended = start(*flags)
    assert ended.returncode == 1
    assert "Address already in use" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_typos_are_reported() -> None:
    """A misspelt variable is named, and the server starts all the same."""
    with server("--demo", INFERENCE_PROT="1") as client:
        client.until("/health/live")
        client.process.terminate()
        output, _ = client.process.communicate(timeout=30)
    assert "INFERENCE_PROT is not a setting, did you mean INFERENCE_PORT?" in output


def test_port_answers_while_models_load(tmp_path: Path) -> None:
    """Liveness answers before the model is converted, readiness only after; the answer is right."""
    with server("--demo", INFERENCE_CACHE_DIR=str(tmp_path)) as client:
        client.until("/health/live")
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["reasons"] == [f"{DEMO}: loading"]
        client.until("/health/ready")
        answer = client.post("/api/embed", json={"model": DEMO, "text": "Hello, world!"}).json()
        assert answer["dimensions"] == 384
        assert answer["embeddings"][0][0] == pytest.approx(-0.0381, abs=1e-4)


@contextmanager
def accepted(client: Server, texts: int) -> Iterator[list[httpx.Response]]:
    """A request that has been accepted and still waits; its answer is in the list at the end."""
    answers: list[httpx.Response] = []
    body = {"model": DEMO, "input": ["word " * 300] * texts}
    url = f"{client.base_url}/api/embed"
    thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=30)))
    thread.start()
    while client.get("/health/status").json()["models"][DEMO]["queue"] == 0:
        pass
    yield answers
    thread.join(30)


def test_sigterm_drains() -> None:
    """SIGTERM: probes are still answered, new work is refused, accepted work ends, exit 0."""
    with server("--demo", "--drain-grace-ms", "1500") as client:
        client.until("/health/ready")
        with accepted(client, 60) as answers:
            client.process.send_signal(signal.SIGTERM)
            while client.get("/health/ready").is_success:
                pass
            refused = client.post("/api/embed", json={"model": DEMO, "text": "late"})
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert "shutting down" in refused.json()["error"]
        assert answers[0].status_code == 200
        output, _ = client.process.communicate(timeout=30)
        assert client.process.returncode == 0
        events = [json.loads(line)["event"] for line in output.splitlines()]
        assert "server.draining" in events
        assert events[-1] == "server.stopped"


def test_drain_timeout_is_a_503() -> None:
    """Work that is not done when the time to drain is over gets the contract's 503."""
    flags = ("--drain-grace-ms", "0", "--drain-timeout-ms", "1000", "--threads", "1")
    with server("--demo", *flags) as client:
        client.until("/health/ready")
        with accepted(client, 128) as answers:
            client.process.send_signal(signal.SIGTERM)
            client.process.communicate(timeout=30)
        assert client.process.returncode == 0
        assert answers[0].status_code == 503
        assert answers[0].json()["code"] == "SERVICE_UNAVAILABLE"


def test_second_signal_ends_at_once() -> None:
    """A second signal does not wait for the grace period."""
    with server("--demo", "--drain-grace-ms", "60000") as client:
        client.until("/health/live")
        client.process.send_signal(signal.SIGTERM)
        while client.get("/health/ready").json()["reasons"][-1] != "the server is shutting down":
            pass
        client.process.send_signal(signal.SIGTERM)
        client.process.communicate(timeout=20)
        assert client.process.returncode == 0


def test_logs_are_json_without_texts() -> None:
    """Every line of the log is JSON, one event per request, and none holds a request's text."""
    marker = "xyzzy-marker"
    with server("--demo") as client:
        client.until("/health/ready")
        client.post("/api/embed", json={"model": DEMO, "text": marker})
        client.post("/api/embed", json={"model": DEMO, "text": marker, "dimensions": 999})
        client.get("/nope")
        client.process.terminate()
        output, _ = client.process.communicate(timeout=30)
    assert marker not in output
    events = [json.loads(line) for line in output.splitlines()]
    requests = [event for event in events if event["event"] == "request"]
    assert [event["status"] for event in requests] == [200, 400, 404]
    assert requests[0]["tokens"] > 2
    assert all(event["request_id"] and event["level"] for event in requests)


def test_pretty_logs() -> None:
    """`LOG_FORMAT=pretty` is for people."""
    with server("--demo", LOG_FORMAT="pretty") as client:
        client.until("/health/live")
        client.process.terminate()
        output, _ = client.process.communicate(timeout=30)
    assert "server.listening" in output
    assert not output.startswith("{")


def resident_mb(client: Server) -> float:
    """Resident memory of the server, MiB."""
    status = Path(f"/proc/{client.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_unloading_returns_memory() -> None:
    """A model that nobody uses goes, its memory too, and it serves when asked again."""
    with server("--demo", "--model-ttl-seconds", "1") as client:
        client.until("/health/ready")
        body = {"model": DEMO, "text": "Hello"}
        assert client.post("/api/embed", json=body).status_code == 200
        loaded = resident_mb(client)
        assert client.get("/health").json()["cache_info"] == {
            "cached_models": [DEMO], "num_cached": 1, "max_cached": 0, "cache_ttl": 1,
        }  # fmt: skip
        deadline = time.monotonic() + 20
        while client.get("/health").json()["loaded_models"] or resident_mb(client) > loaded - 60:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.get("/health/live").is_success
        assert client.post("/api/embed", json=body).status_code == 200


_LOSES_ITS_GPU = """
import sys, threading
from embedding_server import cli, server
create_app = server.create_app
def create(settings):
    app = create_app(settings)
    def lose():
        sys.stdin.readline()
        app.parts.device.lost = "CUDA failure 700: an illegal memory access was encountered"
    threading.Thread(target=lose, daemon=True).start()
    return app
server.create_app = create
sys.exit(cli.main(sys.argv[1:]))
"""


def test_lost_device(models: Path, cache: Path) -> None:
    """A GPU that is gone ends the process in order, with a status that has another one started."""
    port = free_port()
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    flags += ["--cache-dir", str(cache), "--hostname", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", _LOSES_ITS_GPU, "serve", *flags],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process, Server(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            client.process = process
            client.until("/health/ready")
            log, _ = process.communicate("lose it\n", timeout=20)
            assert process.returncode == 1
            assert [one for one in log.splitlines() if "device.lost" in one]
            assert "server.stopped" in log
        finally:
            process.kill()


def test_https(tmp_path: Path) -> None:
    """With a certificate the server speaks HTTPS, large answers included."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -out {certificate} -keyout {key}"
    subprocess.run(command.split(), check=True, capture_output=True)
    flags = ("--ssl-enabled", "--tls-cert-path", str(certificate), "--tls-key-path", str(key))
    with server("--demo", *flags) as plain:
        url = str(plain.base_url).replace("http:", "https:")
        context = ssl.create_default_context(cafile=certificate)
        with Server(base_url=url, verify=context, timeout=30) as client:
            client.process = plain.process
            client.until("/health/ready")
            port = str(plain.base_url.port)
            check = ["healthcheck", "--ssl-enabled", "--port", port]
            subprocess.run([*COMMAND[:-1], *check], check=True)
            body = {"model": DEMO, "input": ["Hello"] * 100}
            answer = client.post("/api/embed", json=body)
            assert len(answer.json()["embeddings"]) == 100
            shown = re.search(
                r"^inference_certificate_\w+ (\S+)", client.get("/metrics").text, re.M
            )
            assert shown
            assert float(shown[1]) == pytest.approx(time.time() + 86400, abs=600)


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """Names, encodings and bodies: a thousandth of what they become, and the last all values."""
    plain = b'{"model":"tiny","input":"' + b"a" * (100 << 20) + b'"}'
    packed = gzip.compress(plain)
    yield "honest", "gzip", packed
    yield "lying", "gzip", packed[:-4] + (1 << 20).to_bytes(4, "little")
    yield "within the limit", "gzip", gzip.compress(plain[: 30 << 20])
    no_size = {zstd.CompressionParameter.content_size_flag: 0}
    yield "silent", "zstd", zstd.compress(plain, options=no_size)  # type: ignore[arg-type]
    yield "honest", "zstd", zstd.compress(plain)
    lists = b'{"model":"tiny","input":[' + b"[]," * 174_000 + b"[]]}"
    yield "many values", "gzip", gzip.compress(lists)
    yield "all values", "identity", lists * 60


def test_bombs(models: Path, cache: Path) -> None:
    """Bodies that become a thousand times their size, or many values, cost little."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    with server(*flags, "--cache-dir", str(cache), "--warmup-ms", "0") as client:
        client.until("/health/ready")
        status = Path(f"/proc/{client.process.pid}/status")
        for name, encoding, body in bombs():
            Path(f"/proc/{client.process.pid}/clear_refs").write_text("5")  # forget the peak
            before = resident_mb(client)
            headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
            answer = client.post("/api/embed", content=body, headers=headers)
            (peak,) = re.findall(r"VmHWM:\s+(\d+)", status.read_text())
            grown = int(peak) / 1024 - before
            assert answer.status_code in (400, 413)
            assert grown < (150 if encoding == "identity" else 50), (name, encoding)
