"""Whose address a request has: forwarded ones count from trusted proxies only."""

from typing import Any

import pytest

from embedding_server.api.addresses import Proxies, subscriber
from embedding_server.errors import SettingsError
from tests.conftest import Client, Serve

TRUSTED = ("10.0.0.0/8", "192.0.2.1", "2001:db8::/32")


def client(peer: str, *headers: tuple[str, str], trusted: tuple[str, ...] = TRUSTED) -> str:
    """The client of a request from `peer` with these headers."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    scope: Any = {"client": (peer, 1), "headers": raw}
    return Proxies(trusted).client(scope)


def xff(value: str) -> tuple[str, str]:
    """An `X-Forwarded-For`."""
    return ("X-Forwarded-For", value)


@pytest.mark.parametrize(
    ("peer", "headers", "found"),
    [
        ("203.0.113.9", [xff("1.2.3.4")], "203.0.113.9"),
        ("203.0.113.9", [("Forwarded", "for=1.2.3.4")], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [xff("1.2.3.4")], "1.2.3.4"),
        ("10.0.0.1", [xff("6.6.6.6, 1.2.3.4")], "1.2.3.4"),
        ("10.0.0.1", [xff("6.6.6.6, 1.2.3.4, 10.9.9.9, 192.0.2.1")], "1.2.3.4"),
        ("10.0.0.1", [xff("6.6.6.6"), xff("1.2.3.4"), xff("10.2.2.2")], "1.2.3.4"),
        ("10.0.0.1", [xff("10.3.3.3, 10.2.2.2")], "10.3.3.3"),
        ("10.0.0.1", [xff("1.2.3.4:5678")], "1.2.3.4"),
        ("10.0.0.1", [xff("[2a00::1]:5678")], "2a00::1"),
        ("10.0.0.1", [xff("2A00:0::1")], "2a00::1"),
        ("::ffff:10.0.0.1", [xff("::ffff:1.2.3.4")], "1.2.3.4"),
        ("2001:db8::5", [xff("1.2.3.4")], "1.2.3.4"),
        ("10.0.0.1", [xff("1.2.3.4, nonsense")], "10.0.0.1"),
        ("10.0.0.1", [xff("1.2.3.4, nonsense, 10.5.5.5")], "10.5.5.5"),
        ("10.0.0.1", [xff(", ,")], "10.0.0.1"),
        ("10.0.0.1", [("Forwarded", 'for="[2a00::1]:9";proto=https;by=10.0.0.1')], "2a00::1"),
        ("10.0.0.1", [("Forwarded", "proto=http;For=6.6.6.6, by=x; FOR=1.2.3.4")], "1.2.3.4"),
        ("10.0.0.1", [("Forwarded", "for=1.2.3.4, for=_hidden")], "10.0.0.1"),
        ("10.0.0.1", [("Forwarded", "for=unknown")], "10.0.0.1"),
        ("10.0.0.1", [("Forwarded", "proto=https")], "10.0.0.1"),
        ("10.0.0.1", [("Forwarded", "for=1.2.3.4"), xff("1.2.3.4")], "1.2.3.4"),
        ("10.0.0.1", [("Forwarded", "for=6.6.6.6"), xff("1.2.3.4")], "10.0.0.1"),
        ("10.0.0.1", [xff("1.2.3.4, " * 10_000 + "10.7.7.7")], "1.2.3.4"),
    ],
)
def test_client(peer: str, headers: list[tuple[str, str]], found: str) -> None:
    """It is the rightmost address that is no proxy, as far as one can trace it back."""
    assert client(peer, *headers) == found


def test_nobody_is_believed_by_default() -> None:
    """Without trusted proxies there is nothing to do."""
    assert not Proxies(())
    assert client("10.0.0.1", xff("1.2.3.4"), trusted=()) == "10.0.0.1"


def test_wrong_networks() -> None:
    """A name is no address."""
    with pytest.raises(SettingsError, match="'proxy.local' is neither an address nor a network"):
        Proxies(("proxy.local",))
    assert repr(Proxies(("10.1.2.3/8",))) == "Proxies(10.0.0.0/8)"


def test_subscribers() -> None:
    """A subscriber has 2**64 addresses of version 6, and counts once."""
    assert subscriber("2a00:1:2:3:4:5:6:7") == subscriber("2a00:1:2:3::") == "2a00:1:2:3::/64"
    assert subscriber("::ffff:1.2.3.4") == "1.2.3.4"
    assert subscriber("fe80::1%eth0") == "fe80::/64"
    assert subscriber("no:address") == "no:address"


async def test_limits_go_by_it(serve: Serve) -> None:
    """Each client behind a proxy has its own minute; what others write changes nothing."""
    body = {"model": "tiny", "text": "a"}

    async def status(caller: Client, forwarded: str) -> int:
        headers = {"X-Forwarded-For": forwarded}
        return (await caller.post("/api/embed", json=body, headers=headers)).status_code

    async with serve(rate_limit=1, trusted_proxies=("127.0.0.1",)) as caller:
        found = [await status(caller, one) for one in ("1.1.1.1", "2.2.2.2", "9.9.9.9, 1.1.1.1")]
        assert found == [200, 200, 429]
    async with serve(rate_limit=1) as caller:
        assert [await status(caller, one) for one in ("1.1.1.1", "2.2.2.2")] == [200, 429]
