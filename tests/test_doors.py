"""Connections of a real server: limits of their number, size and time, and TLS that is renewed."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import trustme

from tests.process import Server, server

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """A server that takes eight connections at once."""
    with server("--demo", "--max-connections", "8", "--log-level", "error") as client:
        client.until("/health/ready")
        yield client


def connect(demo: Server) -> socket.socket:
    """A connection that nothing is said on yet."""
    assert demo.base_url.port
    return socket.create_connection(("127.0.0.1", demo.base_url.port), timeout=20)


def heard(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """The status and the JSON of an answer that ends with its connection."""
    content = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = content.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 101 + b"\r\n", 431, "HEADERS_TOO_LARGE"),
        (b"GET /health HTTP/1.1\r\nX-A: " + b"b" * 70_000 + b"\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "URI_TOO_LONG"),
        (b"nonsense\r\n\r\n", 400, "BAD_REQUEST"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "BAD_REQUEST"),
    ],
)
def test_what_is_no_request(demo: Server, sent: bytes, status: int, code: str) -> None:
    """It is told so in our own shape, and its connection closed."""
    with connect(demo) as connection:
        connection.sendall(sent)
        answered, body = heard(connection)
    assert (answered, body["code"]) == (status, code)
    assert demo.get("/health/live").is_success


def test_headers_that_stop_half_way(demo: Server) -> None:
    """They are waited for for ten seconds, then it is a 408."""
    started = time.monotonic()
    with connect(demo) as connection:
        connection.sendall(b"POST /api/embed HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        status, body = heard(connection)
    assert (status, body["code"]) == (408, "REQUEST_TIMEOUT")
    assert 9 < time.monotonic() - started < 15


def test_too_many_connections(demo: Server) -> None:
    """One more gets a 503 that says when to come back; probes are answered all the same."""
    body = {"model": MODEL, "text": "a"}
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(demo))
        with httpx.Client(base_url=demo.base_url) as one_more:
            assert one_more.get("/health/ready").status_code == 200
        with httpx.Client(base_url=demo.base_url) as one_more:
            refused = one_more.post("/api/embed", json=body)
        assert refused.status_code == 503
        assert refused.json()["code"] == "SERVICE_UNAVAILABLE"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
    with httpx.Client(base_url=demo.base_url) as again:
        assert again.post("/api/embed", json=body).status_code == 200


class Authority:
    """One that signs certificates into the same two files, again and again."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.chain, self.key = directory / "chain.pem", directory / "key.pem"
        self.trusted = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.trusted))
        self.renew()

    def renew(self) -> None:
        """A new certificate in place of the old one."""
        made = self.ca.issue_cert("127.0.0.1")
        made.private_key_pem.write_to_path(str(self.key))
        made.cert_chain_pems[0].write_to_path(str(self.chain))

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of a server with it."""
        paths = ("--tls-cert-path", str(self.chain), "--tls-key-path", str(self.key))
        return ("--demo", "--log-level", "error", "--ssl-enabled", *paths)

    def context(self) -> ssl.SSLContext:
        """What trusts it."""
        return ssl.create_default_context(cafile=self.trusted)


def serial(port: int, context: ssl.SSLContext) -> object:
    """Which certificate a new connection gets."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        found = tls.getpeercert()
        assert found
        return found["serialNumber"]


def test_a_certificate_is_renewed(tmp_path: Path) -> None:
    """New connections get it within seconds, no request is lost, a broken one is kept out."""
    authority = Authority(tmp_path)
    with server(*authority.flags) as plain:
        port = plain.base_url.port
        assert port
        context, url = authority.context(), f"https://127.0.0.1:{port}"
        with Server(base_url=url, verify=context, timeout=30) as client:
            client.process = plain.process
            client.until("/health/ready")
        before = serial(port, context)
        stop, statuses = threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                with httpx.Client(verify=context) as one:
                    body = {"model": MODEL, "text": "a"}
                    statuses.append(one.post(f"{url}/api/embed", json=body).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        authority.renew()
        deadline = time.monotonic() + 20
        while serial(port, context) == before:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        renewed = serial(port, context)
        authority.chain.write_text("broken")
        time.sleep(4)
        assert serial(port, context) == renewed
        stop.set()
        asking.join()
    assert len(statuses) > 10
    assert set(statuses) == {200}


def test_clients_with_certificates(tmp_path: Path) -> None:
    """Where an authority of clients is named, nobody else gets in; probes need none."""
    authority = Authority(tmp_path)
    mine = authority.ca.issue_cert("client@example.org")
    mine.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    flags = (*authority.flags, "--tls-client-ca-path", str(authority.trusted))
    with server(*flags) as plain:
        url = f"https://127.0.0.1:{plain.base_url.port}"
        body = {"model": MODEL, "text": "a"}
        with Server(base_url=url, verify=authority.context(), timeout=30) as client:
            client.process = plain.process
            client.until("/health/ready")
            refused = client.post("/api/embed", json=body)
            assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED")
        known = authority.context()
        known.load_cert_chain(tmp_path / "client.pem")
        with httpx.Client(base_url=url, verify=known) as client:
            assert client.post("/api/embed", json=body).status_code == 200
        strange = authority.context()
        other = trustme.CA().issue_cert("client@example.org")
        other.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "other.pem"))
        strange.load_cert_chain(tmp_path / "other.pem")
        with (
            httpx.Client(base_url=url, verify=strange) as client,
            pytest.raises(httpx.TransportError),
        ):
            client.post("/api/embed", json=body)
