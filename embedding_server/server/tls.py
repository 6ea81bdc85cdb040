"""The certificate: read at the start, read again when its files change, TLS 1.2 and newer.

Every handshake takes the newest context that could be made of the files. A context is made whole
before anybody sees it, so that no handshake meets a new certificate with an old key; connections
keep what they began with.
"""

import math
import ssl
from _ssl import _test_decode_cert  # type: ignore[attr-defined]
from pathlib import Path

from embedding_server.errors import SettingsError, StartupError
from embedding_server.settings import Settings
from embedding_server.watch import follow


class Certificate:
    """A certificate chain with its key, and what it takes of clients.

    Args:
        chain: PEM.
        key: PEM, without a password.
        client_ca: authorities of clients, PEM; None: clients need no certificates.

    Raises:
        StartupError: one of them cannot be used.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._chain, self._key = chain, key
        self.client_ca = client_ca
        self._newest = self._read()
        self.context = self._read()
        """What a server is made with: it hands every handshake over to the newest one."""
        self.context.sni_callback = self._hand_over

    def __repr__(self) -> str:
        return f"Certificate({self._chain})"

    def expiry(self) -> float:
        """When the file's first certificate expires, since 1970; NaN where it cannot be read."""
        try:
            decoded = _test_decode_cert(str(self._chain))  # the only way there in Python itself
            return ssl.cert_time_to_seconds(decoded["notAfter"])
        except (OSError, ValueError):
            return math.nan

    async def follow(self) -> None:
        """Read the files again when they change, for ever."""
        paths = [self._chain, self._key, *([self.client_ca] if self.client_ca else [])]
        await follow("TLS_SERVER_CERT_PATH", paths, self._read, self._use)

    def _use(self, context: ssl.SSLContext) -> None:
        self._newest = context

    def _hand_over(self, tls: ssl.SSLObject, _name: str | None, _old: ssl.SSLContext) -> None:
        """Called in every handshake, whether or not the client names a server."""
        tls.context = self._newest

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._chain, self._key, password=_no_password)
        except (OSError, ValueError) as exc:
            raise StartupError(
                f"TLS_SERVER_CERT_PATH={str(self._chain)!r},"
                f" TLS_SERVER_KEY_PATH={str(self._key)!r}: {exc}"
            ) from exc
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as exc:
                raise StartupError(f"TLS_CLIENT_CA_PATH={str(self.client_ca)!r}: {exc}") from exc
            # Probes have none. And a resumed session is not looked at again, even if its
            # authority is gone.
            context.verify_mode = ssl.CERT_OPTIONAL
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context


def open_certificate(settings: Settings) -> Certificate | None:
    """That of the settings, None without TLS; raises `StartupError`."""
    if not settings.ssl_enabled:
        if settings.tls_client_ca_path:
            raise SettingsError("TLS_CLIENT_CA_PATH: needs SERVER_SSL_ENABLED=true")
        return None
    chain, key = settings.tls_cert_path, settings.tls_key_path
    if not chain or not key:
        raise SettingsError(
            "SERVER_SSL_ENABLED=true: set TLS_SERVER_CERT_PATH and TLS_SERVER_KEY_PATH too"
        )
    return Certificate(chain, key, settings.tls_client_ca_path)


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key needs a password: decrypt it first")
