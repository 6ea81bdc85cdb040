"""Whose address a request has: the connection's, or what trusted proxies say it was before them.

Nothing that a stranger writes is believed. Every proxy adds the address it was called from behind
what it was sent, so the rightmost address that is no proxy of ours is the last that one of ours has
seen itself; whatever is left of it may be made up.
"""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

from litestar.types import Scope

from embedding_server.errors import SettingsError
from embedding_server.settings import Names

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FOR = re.compile(r'(?:^|[;\s])for\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)', re.IGNORECASE)
_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+")
_REMEMBERED = 4096
_CHARS, _HOPS = 4096, 32
"""Longer chains are nobody's but an attacker's: only their right end is read."""


class Proxies:
    """The proxies whose word counts.

    Args:
        given: addresses and networks.

    Raises:
        SettingsError: one is neither.
    """

    def __init__(self, given: Names) -> None:
        self._networks = [_network(one) for one in given]
        self._seen = lru_cache(_REMEMBERED)(self._look)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._networks)

    def __repr__(self) -> str:
        return f"Proxies({', '.join(map(str, self._networks))})"

    def client(self, scope: Scope) -> str:
        """The address of a request's client."""
        peer = (scope.get("client") or ("", 0))[0]
        address, trusted = self._seen(peer)
        if not trusted:
            return peer
        listed = _values(scope, b"x-forwarded-for")
        elements = _values(scope, b"forwarded")
        if not elements:
            return self._last(address, listed)
        named = [match[1].strip('"') if (match := _FOR.search(one)) else "" for one in elements]
        found = self._last(address, named)
        # A proxy that writes one of the two leaves the other as the client sent it.
        return found if not listed or self._last(address, listed) == found else address

    def _last(self, address: str, hops: Sequence[str]) -> str:
        """The rightmost of `hops` that is no proxy; `address` is the proxy that they come from."""
        for hop in reversed(hops):
            found, trusted = self._seen(hop)
            if not found:
                return address  # hidden, or nonsense: nobody but that proxy is known
            address = found
            if not trusted:
                break
        return address

    def _look(self, text: str) -> tuple[str, bool]:
        """An address as it is usually written, empty where it is none; whether it is a proxy's."""
        address = _parsed(text)
        if address is None:
            return "", False
        return str(address), any(address in network for network in self._networks)


@lru_cache(_REMEMBERED)
def subscriber(address: str) -> str:
    """Who is behind an IPv6 address: its /64, for one subscriber has all of these."""
    parsed = _parsed(address)
    if not isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed or address)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


def _parsed(text: str) -> _Address | None:
    text = text.strip()
    if match := _PORT.fullmatch(text):
        text = match[1] or match[2] or ""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _values(scope: Scope, name: bytes) -> list[str]:
    """The elements of a list that may be spread over several headers."""
    values = [value for key, value in scope["headers"] if key == name]
    if not values:
        return []
    text = b",".join(values)[-_CHARS:].decode("latin-1")
    return [one.strip() for one in text.split(",")[-_HOPS:]]


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as exc:
        raise SettingsError(
            f"INFERENCE_TRUSTED_PROXIES: {text!r} is neither an address nor a network: {exc}"
        ) from exc
