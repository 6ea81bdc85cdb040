"""`embedding-server healthcheck`: whether the server on this machine is ready, for containers.

A check runs every few seconds beside a server that needs its cores: it imports next to nothing.
"""

import http.client
import ssl

from embedding_server.errors import StartupError
from embedding_server.settings import Settings

_PATH = "/health/ready"
_SECONDS = 3.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what the server may listen on


def check_health(settings: Settings) -> None:
    """Ask the server of these settings, by HTTPS if it speaks that; its certificate may be any.

    Raises:
        StartupError: it does not answer, or is not ready.
    """
    host = _ANYWHERE.get(settings.hostname, settings.hostname)
    if settings.ssl_enabled:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is ourselves
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, settings.port, timeout=_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, settings.port, timeout=_SECONDS)
    try:
        connection.request("GET", _PATH)
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:
        raise StartupError(f"{host}:{settings.port} does not answer: {exc}") from exc
    finally:
        connection.close()
    if answer.status != 200:
        raise StartupError(f"{host}:{settings.port} is not ready: {answer.status} {body}")
