"""What browsers are told: security headers on every answer, and what pages of others may do."""

import pytest

from tests.conftest import Client, Serve

BODY = {"model": "tiny", "text": "the of and"}
PAGE = {"Origin": "https://a.example"}
ASKING = PAGE | {"Access-Control-Request-Method": "POST"}


async def test_every_answer(client: Client) -> None:
    """Successes and failures alike; nothing says who made the server, or asks for TLS."""
    answers = [
        await client.post("/api/embed", json=BODY),
        await client.post("/api/embed", json=[]),
        await client.post("/v1/embeddings", json={"model": "none", "input": "a"}),
        await client.get("/nope"),
        await client.put("/api/embed"),
        await client.get("/health/live"),
        await client.get("/metrics"),
        await client.get("/api/openapi.json"),
        await client.options("/api/embed", headers=ASKING),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"] == "default-src 'none'"
        for name in ("server", "x-powered-by", "strict-transport-security"):
            assert name not in answer.headers


async def test_tls_only(serve: Serve) -> None:
    """With TLS browsers are told to use nothing else."""
    async with serve(ssl_enabled=True) as client:
        answer = await client.get("/health/live")
        assert answer.headers["strict-transport-security"] == "max-age=31536000"


async def test_documentation(client: Client) -> None:
    """The page runs its own script and files of this server; these may be kept."""
    page = await client.get("/swagger-ui")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self' 'sha256-" in policy
    assert "script-src 'self' 'unsafe-inline'" not in policy
    assert page.headers.get_list("content-security-policy") == [policy]
    script = await client.get("/swagger-ui/assets/swagger-ui-bundle.js")
    assert script.headers["x-content-type-options"] == "nosniff"
    assert "no-store" not in script.headers.get("cache-control", "")


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings", "/health", "/nope", "/"])
async def test_preflights(serve: Serve, path: str) -> None:
    """Every path answers them, with the headers that clients send, keys set or not."""
    wanted = "authorization, content-type, x-api-key, x-request-timeout-ms, x-stainless-os"
    asking = ASKING | {"Access-Control-Request-Headers": wanted}
    async with serve(api_keys=("secret",)) as client:
        answer = await client.options(path, headers=asking)
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["access-control-allow-headers"] == wanted
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in answer.headers
        asking["Access-Control-Request-Headers"] = "x;y"
        answer = await client.options(path, headers=asking)
        assert "access-control-allow-headers" not in answer.headers


async def test_origins(serve: Serve) -> None:
    """Origins of the list may, patterns in it are of names, all others may not."""
    allowed = ("https://a.example", "https://*.b.example")
    async with serve(cors_allowed_origins=allowed, wait=False) as client:
        for origin, may in {
            "https://a.example": True,
            "https://x.y.b.example": True,
            "https://a.example.evil": False,
            "http://a.example": False,
            "https://evil/.b.example": False,
            "https://axexample": False,
            "null": False,
        }.items():
            answer = await client.get("/health/live", headers={"Origin": origin})
            assert answer.headers["vary"] == "origin"
            assert (answer.headers.get("access-control-allow-origin") == origin) is may, origin
            answer = await client.options("/api/embed", headers=ASKING | {"Origin": origin})
            assert ("access-control-allow-methods" in answer.headers) is may
        answer = await client.get("/health/live")
        assert "vary" not in answer.headers
    async with serve(cors_allowed_origins=(), wait=False) as client:
        answer = await client.get("/health/live", headers=PAGE)
        assert "access-control-allow-origin" not in answer.headers


async def test_refusals_can_be_read(serve: Serve) -> None:
    """A page sees that its key is wrong, that it asks too often, and for how long."""
    async with serve(api_keys=("secret",), rate_limit=1) as client:
        refused = await client.post("/api/embed", json=BODY, headers=PAGE)
        key = PAGE | {"Authorization": "Bearer secret"}
        await client.post("/api/embed", json=BODY, headers=key)
        limited = await client.post("/api/embed", json=BODY, headers=key)
        assert (refused.status_code, limited.status_code) == (401, 429)
        for answer in (refused, limited):
            assert answer.headers["access-control-allow-origin"] == "*"
            shown = answer.headers["access-control-expose-headers"].lower().split(", ")
            assert {"retry-after", "ratelimit", "x-request-id", "x-queue-depth"} <= set(shown)
