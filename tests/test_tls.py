"""HTTPS of a real server: versions, renewal under load, client certificates, health checks."""

import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.process import Server, server
from tests.test_health import healthcheck

BODY = {"model": "tiny", "text": "the of and"}


class Files:
    """A certificate, its key and what signed it, as files."""

    def __init__(self, folder: Path) -> None:
        self.chain, self.key = folder / "chain.pem", folder / "key.pem"
        self.ca = trustme.CA()
        self.renew()

    def renew(self) -> None:
        """A new certificate of the same authority, written as careless people do."""
        made = self.ca.issue_cert("localhost", "127.0.0.1")
        self.key.write_bytes(made.private_key_pem.bytes())
        self.chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))

    @property
    def serial(self) -> int:
        """The serial number of what is in the file."""
        found = ssl._ssl._test_decode_cert(str(self.chain))  # type: ignore[attr-defined]
        return int(found["serialNumber"], 16)

    def trusting(self, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """A client's side, with its certificate if it has one."""
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if client:
            client.configure_cert(context)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Those of a server."""
    return Files(tmp_path)


@contextmanager
def https(files: Files, models: Path, cache: Path, **env: str) -> Iterator[Server]:
    """A server of the tiny model with these."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    flags += ["--cache-dir", str(cache), "--warmup-ms", "0"]
    flags += [
        "--ssl-enabled",
        "--tls-cert-path",
        str(files.chain),
        "--tls-key-path",
        str(files.key),
    ]
    with server(*flags, cwd=None, **env) as plain:
        url = str(plain.base_url).replace("http:", "https:")
        with Server(base_url=url, verify=files.trusting(), timeout=30) as client:
            client.process = plain.process
            client.until("/health/ready")
            yield client


def port(client: Server) -> int:
    """A server's port."""
    found = client.base_url.port
    assert found
    return found


def handshake(client: Server, context: ssl.SSLContext) -> Any:
    """Version and serial number of what the server shows in a new handshake."""
    with (
        socket.create_connection(("127.0.0.1", port(client)), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        shown: Any = tls.getpeercert()
        return tls.version(), int(shown["serialNumber"], 16)


def test_handshakes(files: Files, models: Path, cache: Path) -> None:
    """TLS 1.2 and 1.3 for who trusts the authority; nothing for others; curl too; health checks."""
    with https(files, models, cache) as client:
        answer = client.post("/api/embed", json=BODY)
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        for version, name in (
            (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
            (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
        ):
            context = files.trusting()
            context.minimum_version = context.maximum_version = version
            assert handshake(client, context)[0] == name
        old = files.trusting()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)):
            handshake(client, old)
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(client, ssl.create_default_context())
        plain = httpx.Client(base_url=f"http://127.0.0.1:{port(client)}")
        with plain, pytest.raises(httpx.TransportError):
            plain.get("/health/live")
        ca = files.chain.with_name("ca.pem")
        files.ca.cert_pem.write_to_path(str(ca))
        curl = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(ca)]
        url = f"https://localhost:{port(client)}/health/ready"
        if shutil.which("curl"):
            ran = subprocess.run([*curl, url], check=True, capture_output=True, text=True)
            assert '"status":"ok"' in ran.stdout
            ran = subprocess.run([*curl[:-2], url], check=False, capture_output=True, text=True)
            assert ran.returncode == 60, ran.stderr  # it cannot verify the certificate
        assert healthcheck(port(client), SERVER_SSL_ENABLED="true").returncode == 0
        assert healthcheck(port(client)).returncode == 1
        assert client.get("/health/live").is_success
        client.process.terminate()
        log, _ = client.process.communicate(timeout=30)
        assert "Traceback" not in log
        assert '"level":"error"' not in log


def test_renewal_under_load(files: Files, models: Path, cache: Path) -> None:
    """Certificates change while requests go on, on kept and on new connections; none fails."""
    answered: list[int] = []
    stop = threading.Event()

    def ask(*, keep: bool) -> None:
        kept = httpx.Client(verify=files.trusting(), timeout=30) if keep else None
        while not stop.is_set():
            one = kept or httpx.Client(verify=files.trusting(), timeout=30)
            answered.append(one.post(f"{client.base_url}/api/embed", json=BODY).status_code)
            if not keep:
                one.close()
        if kept:
            kept.close()

    def until(serial: int) -> None:
        deadline = time.monotonic() + 15
        while handshake(client, files.trusting())[1] != serial:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    # Nobody reads its log meanwhile: one event per request would fill the pipe.
    quiet = https(files, models, cache, LOG_LEVEL="warning")
    with quiet as client, ThreadPoolExecutor() as pool:
        first = files.serial
        assert handshake(client, files.trusting())[1] == first
        asking = [pool.submit(ask, keep=keep) for keep in (True, True, False)]
        try:
            files.renew()
            until(second := files.serial)
            files.key.write_text("no key")
            time.sleep(3)
            assert handshake(client, files.trusting())[1] == second
            files.chain.unlink()
            time.sleep(3)
            assert handshake(client, files.trusting())[1] == second
            files.renew()
            until(files.serial)
        finally:
            stop.set()
        for one in asking:
            one.result()
        assert len(answered) > 50
        assert set(answered) == {200}
        text = client.get("/metrics").text
        found = re.search(
            r"^inference_certificate_expiry_timestamp_seconds (\S+)", text, re.MULTILINE
        )
        assert found
        assert float(found[1]) > time.time()
        client.process.terminate()
        log, _ = client.process.communicate(timeout=30)
        assert log.count('"reload.failed"') == 2
        assert "no key" not in log


def test_client_certificates(files: Files, models: Path, cache: Path, tmp_path: Path) -> None:
    """Who has none gets a 401, or an answer about health; a stranger's is no certificate."""
    authority, other = trustme.CA(), trustme.CA()
    path = tmp_path / "clients.pem"
    authority.cert_pem.write_to_path(str(path))
    with https(files, models, cache, TLS_CLIENT_CA_PATH=str(path)) as client:
        url = str(client.base_url)
        for route in ("/health/live", "/health/ready", "/health/status", "/health"):
            assert client.get(route).status_code == 200
        refused = client.post("/api/embed", json=BODY)
        assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED")
        assert "client certificate" in refused.json()["error"]
        assert refused.headers["connection"] == "close"
        failure = client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
        assert (failure.status_code, failure.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/metrics").status_code == 401
        mine = files.trusting(authority.issue_cert("client@example.org"))
        with httpx.Client(base_url=url, verify=mine) as known:
            assert known.post("/api/embed", json=BODY).status_code == 200
            assert known.get("/metrics").status_code == 200
        theirs = files.trusting(other.issue_cert("client@example.org"))
        stranger = httpx.Client(base_url=url, verify=theirs)
        with stranger, pytest.raises(httpx.TransportError):
            stranger.get("/health/live")
        assert healthcheck(port(client), SERVER_SSL_ENABLED="true").returncode == 0
        other.cert_pem.write_to_path(str(path))
        deadline = time.monotonic() + 15
        with httpx.Client(base_url=url, verify=theirs) as later:
            while True:
                with suppress(httpx.TransportError):
                    if later.get("/metrics").status_code == 200:
                        break
                assert time.monotonic() < deadline
                time.sleep(0.1)
        gone = httpx.Client(base_url=url, verify=mine)
        with gone, pytest.raises(httpx.TransportError):
            gone.get("/health/live")


def test_silent_handshakes_end(files: Files, models: Path, cache: Path) -> None:
    """A connection that never begins its handshake is closed in time."""
    with (
        https(files, models, cache) as client,
        socket.create_connection(("127.0.0.1", port(client)), 20) as silent,
    ):
        began = time.monotonic()
        assert silent.recv(1) == b""
        assert time.monotonic() - began < 15
