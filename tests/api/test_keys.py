"""API keys: who gets in, who does not, and turns by key."""

import asyncio
import hashlib
from pathlib import Path

import httpx
import pytest

from embedding_server.api.keys import Keys
from embedding_server.errors import SettingsError
from tests.conftest import Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "text": "the of and"}


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"Authorization": f"Bearer {key}"}


async def test_keys_are_asked_for(serve: Serve, tmp_path: Path) -> None:
    """With keys set, only who has one gets in; health and metrics stay open."""
    (tmp_path / "keys").write_text("second\nthird\n")
    async with serve(api_keys=("first", f"@{tmp_path}/keys")) as client:
        for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": "first"}):
            refused = await client.post("/api/embed", json=BODY, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["code"] == "UNAUTHORIZED"
            assert refused.json()["error"].startswith("Unauthorized: ")
            assert refused.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second", "third"):
            answer = await client.post("/api/embed", json=BODY, headers=bearer(key))
            assert answer.status_code == 200
        assert (await client.get("/api/embedders")).status_code == 401
        for path in ("/health/live", "/health/ready", "/metrics", "/swagger-ui"):
            assert (await client.get(path)).status_code == 200, path
        failure = (await client.post("/v1/embeddings", json={"model": "tiny", "input": "a"})).json()
        assert failure["error"]["code"] == "invalid_api_key"
        text = (await client.get("/metrics")).text
        assert 'endpoint="/api/embed",method="POST",status="401"} 4.0' in text
        assert 'endpoint="unmatched",method="GET",status="401"} 1.0' in text


async def test_names_and_hashes(serve: Serve) -> None:
    """A key may have a name, be given as its hash, and come as `X-API-Key`."""
    hashed = hashlib.sha256(b"third=").hexdigest()
    given = ("first", "cGFkZGVk==", "search=zweiter", f"jobs=sha256:{hashed}")
    async with serve(api_keys=given) as client:
        for headers in (
            bearer("first"), bearer("cGFkZGVk=="), {"X-API-Key": "zweiter"}, bearer("third="),
        ):  # fmt: skip
            answer = await client.post("/api/embed", json=BODY, headers=headers)
            assert answer.status_code == 200, headers
        for wrong in (hashed, f"sha256:{hashed}", "search=zweiter", "search", ""):
            for headers in (bearer(wrong), {"X-API-Key": wrong}):
                answer = await client.post("/api/embed", json=BODY, headers=headers)
                assert answer.status_code == 401, headers
        text = (await client.get("/metrics")).text
        for name in ("search", "jobs"):
            assert f'inference_requests_by_key_total{{key="{name}",status="200"}} 1.0' in text
        assert "zweiter" not in text
        assert "third" not in repr(Keys(given))


async def test_without_keys_any_will_do(serve: Serve) -> None:
    """Where none are set, nobody is asked."""
    async with serve() as client:
        answer = await client.post("/api/embed", json=BODY, headers=bearer("whatever"))
        assert answer.status_code == 200


async def test_turns_go_by_key(serve: Serve) -> None:
    """Two keys from one address take turns: one's flood does not keep the other waiting."""
    async with serve(max_concurrent_requests=1, api_keys=("flood", "polite")) as client:
        session = FakeSession(width=HIDDEN)
        session.block()
        model = parts_of(client).engine.registry.residents["tiny"].model
        assert model
        model.batcher.session = session
        done: list[str] = []

        async def call(key: str) -> httpx.Response:
            answer = await client.post("/api/embed", json=BODY, headers=bearer(key))
            done.append(key)
            return answer

        tasks = [asyncio.create_task(call("flood")) for _ in range(8)]
        while parts_of(client).engine.queue.depth < 7:
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(call("polite")))
        while parts_of(client).engine.queue.depth < 8:
            await asyncio.sleep(0.001)
        session.release()
        assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
        assert done.index("polite") <= 2


def test_keys_are_never_shown(tmp_path: Path) -> None:
    """A key's name tells nothing of it, and a file without keys is a mistake that names it."""
    assert "secret" not in repr(Keys(("secret",)))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="empty holds no key"):
        Keys((f"@{tmp_path}/empty",))
    with pytest.raises(SettingsError, match="No such file"):
        Keys((f"@{tmp_path}/missing",))
