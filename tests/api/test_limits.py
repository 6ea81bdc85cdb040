"""`INFERENCE_RATE_LIMIT` and `..._TOKENS`: what a key, or else an address, may have a minute."""

import asyncio

import httpx
import pytest

from embedding_server.api import limits
from embedding_server.api.limits import RateLimit, RateLimits
from embedding_server.errors import RateLimited
from tests.api.dialects import ROUTES, failure, model_of
from tests.conftest import Serve
from tests.fakes import FakeClock, FakeSession
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "text": "a"}


def test_a_bucket_of_a_minute() -> None:
    """A minute's worth may come at once, then as many as flow in; a refusal says when."""
    clock = FakeClock()
    limit = RateLimit(3, clock)
    for _ in range(3):
        limit.spend("a")
    for _ in range(2):  # a refusal costs nothing
        with pytest.raises(RateLimited, match="more than 3 requests a minute") as refused:
            limit.spend("a")
        assert refused.value.retry_after == pytest.approx(20)
    limit.spend("b")
    clock.now += 19.5
    with pytest.raises(RateLimited) as refused:
        limit.spend("a")
    assert refused.value.retry_after == 1.0
    clock.now += 0.5
    limit.spend("a")
    with pytest.raises(RateLimited):
        limit.spend("a")
    clock.now += 1000
    for _ in range(3):
        limit.spend("a")
    with pytest.raises(RateLimited):
        limit.spend("a")


@pytest.mark.parametrize("per_minute", [1, 7, 60, 6000])
def test_no_more_and_no_less(per_minute: int) -> None:
    """Exactly so many pass at once, whatever rounding does; one more at each step of time."""
    clock = FakeClock(1e6)
    limit = RateLimit(per_minute, clock)
    for _ in range(per_minute):
        limit.spend("a")
    for _ in range(3):
        with pytest.raises(RateLimited) as refused:
            limit.spend("a")
        assert refused.value.retry_after
        assert 1 <= refused.value.retry_after <= 60
        clock.now += 60 / per_minute
        limit.spend("a")


def test_none() -> None:
    """0 is no limit, and nobody is remembered."""
    limit = RateLimit(0)
    for _ in range(1000):
        limit.spend("a")
    assert repr(limit) == "RateLimit(0, clients=0)"


async def test_pages_can_read_refusals(serve: Serve) -> None:
    """A page of another origin sees that it has no key, and when to come back."""
    origin = {"Origin": "https://app.example"}
    async with serve(rate_limit=1, api_keys=("key",)) as client:
        answers = [await client.post("/api/embed", json={}, headers=origin)]
        for _ in range(2):
            headers = origin | {"X-API-Key": "key"}
            answers.append(await client.post("/api/embed", json={}, headers=headers))
    assert [answer.status_code for answer in answers] == [401, 400, 429]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


def test_clients_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was longest away, once there are too many; others are not."""
    monkeypatch.setattr(limits, "_MOST_CLIENTS", 10)
    clock = FakeClock()
    limit = RateLimit(60, clock)
    for client in range(10):
        limit.spend(str(client))
    clock.now += 2
    for _ in range(5):
        limit.spend("busy")
    assert repr(limit) == "RateLimit(60, clients=10)"
    assert "0" not in limit._full_at
    for _ in range(55):
        limit.spend("busy")
    with pytest.raises(RateLimited):
        limit.spend("busy")


async def test_every_dialect(serve: Serve) -> None:
    """One too many is a 429 in its dialect's shape, whatever slashes its path has."""
    async with serve(rate_limit=1, default_model=("tiny",)) as client:
        assert (await client.post("/api/embed", json=BODY)).status_code == 200
        for route in ROUTES:
            for path in (route.path, f"{route.path}/", f"//{route.path}"):
                answer = await client.post(f"http://test{path}", json=route.body)
                message = failure(route.early, answer, 429)
                assert message.startswith("Rate limited: more than 1 requests a minute")
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert 1000 <= int(answer.headers["retry-after-ms"]) <= 60_000
        answer = await client.post("/api/v1/models/tiny/unload")
        failure("unified", answer, 429)
        for path in ("/health/live", "/health/ready", "/metrics", "/v1/models", "/api/embedders"):
            assert (await client.get(path)).status_code == 200
        statuses = (await client.get("/api/openapi.json")).json()["paths"]
        assert all("429" in one["post"]["responses"] for one in statuses.values() if "post" in one)
        text = (await client.get("/metrics")).text
        assert 'endpoint="/v1/rerank",method="POST",status="429"} 3.0' in text


async def test_by_address(serve: Serve) -> None:
    """Each address has its own minute."""
    async with serve(rate_limit=2) as client:
        found = [(await client.post("/api/embed", json=BODY)).status_code for _ in range(3)]
        assert found == [200, 200, 429]
        transport = httpx.ASGITransport(client.app, client=("10.0.0.9", 1))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            assert (await other.post("/api/embed", json=BODY)).status_code == 200


async def test_by_key(serve: Serve) -> None:
    """So has each key; a wrong one is told so however often it comes."""
    async with serve(rate_limit=1, api_keys=("one", "two")) as client:
        for key, statuses in (("one", [200, 429]), ("two", [200, 429]), ("three", [401] * 3)):
            headers = {"Authorization": f"Bearer {key}"}
            for status in statuses:
                answer = await client.post("/api/embed", json=BODY, headers=headers)
                assert answer.status_code == status


def test_debts() -> None:
    """What is charged may be more than there is; then one waits until it is paid."""
    clock = FakeClock()
    limit = RateLimit(60, clock, "tokens")
    limit.check("a")
    limit.charge("a", 59)
    limit.check("a")
    assert limit.left("a") == (1, 59)
    limit.charge("a", 31)
    assert limit.left("a") == (0, 90)
    with pytest.raises(RateLimited, match="more than 60 tokens a minute") as refused:
        limit.check("a")
    assert refused.value.retry_after == pytest.approx(31)
    clock.now += 30.9
    with pytest.raises(RateLimited):
        limit.check("a")
    clock.now += 0.2
    limit.check("a")
    limit.charge("a", 6000)
    with pytest.raises(RateLimited) as refused:
        limit.check("a")
    assert refused.value.retry_after == 60


def test_headers() -> None:
    """They tell of both limits; clients that know one read the one of which less is left."""
    clock = FakeClock()
    limits = RateLimits(RateLimit(60, clock), RateLimit(1000, clock, "tokens"))

    def said() -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in limits.headers("a")}

    limits.spend("a")
    assert said() == {
        "ratelimit-policy": '"requests";q=60;w=60, "tokens";q=1000;w=60;qu="tokens"',
        "ratelimit": '"requests";r=59;t=1, "tokens";r=1000;t=0',
        "ratelimit-limit": "60",
        "ratelimit-remaining": "59",
        "ratelimit-reset": "1",
    }
    limits.charge("a", 500)
    found = said()
    assert found["ratelimit"] == '"requests";r=59;t=1, "tokens";r=500;t=30'
    assert (found["ratelimit-limit"], found["ratelimit-remaining"]) == ("1000", "500")
    assert RateLimits(RateLimit(1), RateLimit(0, what="tokens"))
    assert not RateLimits(RateLimit(0), RateLimit(0, what="tokens"))


async def test_tokens(serve: Serve) -> None:
    """Real tokens count, of every route; a client in debt is refused, another is not."""
    async with serve(rate_limit_tokens=12, api_keys=("one", "two")) as client:
        one, two = ({"X-API-Key": key} for key in ("one", "two"))
        answer = await client.post("/api/embed", json=BODY, headers=one)
        left = int(answer.headers["ratelimit-remaining"])
        assert 0 < left < 12
        pairs = {"model": "tiny", "query": "a", "documents": ["the of and"] * 4}
        answer = await client.post("/api/rerank", json=pairs, headers=one)
        assert answer.status_code == 200
        assert answer.headers["ratelimit-remaining"] == "0"
        answer = await client.post("/api/embed", json=BODY, headers=one)
        assert answer.status_code == 429
        assert answer.json()["error"].startswith("Rate limited: more than 12 tokens a minute")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["ratelimit-policy"] == '"tokens";q=12;w=60;qu="tokens"'
        assert (await client.post("/api/embed", json=BODY, headers=two)).status_code == 200
        assert (await client.get("/api/embedders", headers=one)).status_code == 200


async def test_tokens_of_failures(serve: Serve) -> None:
    """What went to be run is paid for by who did not wait for it, and nothing else is."""
    async with serve(rate_limit_tokens=3, api_keys=("one", "two", "three")) as client:
        one, two, three = ({"X-API-Key": key} for key in ("one", "two", "three"))
        session = FakeSession(width=HIDDEN)
        session.block()
        model_of(client).batcher.session = session
        late = await client.post("/api/embed", json=BODY | {"timeout_ms": 20}, headers=one)
        assert late.status_code == 504
        assert (await client.post("/api/embed", json=BODY, headers=one)).status_code == 429
        leaving = asyncio.create_task(client.post("/api/embed", json=BODY, headers=two))
        while 'tokenize_seconds_count{model="tiny"} 2.0' not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert (await client.post("/api/embed", json=BODY, headers=two)).status_code == 429
        wrong = await client.post("/api/embed", json=BODY | {"model": "none"}, headers=three)
        assert (wrong.status_code, wrong.headers["ratelimit-remaining"]) == (400, "3")
        session.release()


async def test_limits_are_documented(serve: Serve) -> None:
    """The document has the headers where there is a limit."""
    for settings, has in (({}, False), ({"rate_limit": 5}, True), ({"rate_limit_tokens": 5}, True)):
        async with serve(wait=False, **settings) as client:
            path = (await client.get("/api/openapi.json")).json()["paths"]["/api/embed"]
            for response in path["post"]["responses"].values():
                assert ("RateLimit-Remaining" in response["headers"]) is has
