"""Headers that tell browsers what not to do with answers, made once.

Answers are data: nothing is to be guessed in them, kept, run or passed on. The documentation's page
runs Swagger UI from this server, and brings its own policy (`page_policy`).
"""

import base64
import hashlib
import re
from collections.abc import Sequence

_Headers = Sequence[tuple[bytes, bytes]]

_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_DATA = ((b"cache-control", b"no-store"), (b"content-security-policy", b"default-src 'none'"))
_TLS = ((b"strict-transport-security", b"max-age=31536000"),)

_INLINE = re.compile(rb"<script[^>]*?>(.+?)</script>", re.DOTALL)


def security_headers(*, tls: bool) -> tuple[_Headers, _Headers]:
    """Those of answers, and those of the documentation's files."""
    always = _ALWAYS + (_TLS if tls else ())
    return always + _DATA, always


def page_policy(page: bytes) -> str:
    """The `Content-Security-Policy` of a page: its own scripts, and files of this server.

    Swagger UI sets styles on elements, and shows images that its style sheet holds.
    """
    digests = (base64.b64encode(hashlib.sha256(one).digest()) for one in _INLINE.findall(page))
    scripts = "".join(f" 'sha256-{one.decode()}'" for one in digests)
    return (
        f"default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline';"
        " img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'self'"
    )
