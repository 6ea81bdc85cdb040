"""API keys: who gets in, who does not, and turns by key."""

import asyncio
import hashlib
from functools import partial
from pathlib import Path

import httpx
import pytest

from embedding_server.api import keys
from embedding_server.api.keys import Keys
from embedding_server.errors import SettingsError
from embedding_server.watch import follow
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


def digest(key: str) -> str:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


async def test_names(serve: Serve, tmp_path: Path) -> None:
    """Keys have names, hashes stand for keys; names are in metrics, keys nowhere."""
    lines = ["# who may come in", "", f"bob=sha256:{digest('bob-key').upper()}  # on leave"]
    (tmp_path / "keys").write_text("\n".join([*lines, "  bare-key", "key=="]))
    hashed = f"sha256:{digest('hashed')}"
    given = ("alice=alice-key", "alice=alice-next", hashed, f"@{tmp_path}/keys")
    names = {
        "alice-key": "alice",
        "alice-next": "alice",
        "bob-key": "bob",
        "bare-key": f"key-{digest('bare-key')[:8]}",
        "hashed": f"key-{digest('hashed')[:8]}",
        "key==": f"key-{digest('key==')[:8]}",
    }
    async with serve(api_keys=given) as client:
        for key in names:
            for headers in (bearer(key), {"X-API-Key": key}, {"Authorization": f"bearer  {key} "}):
                answer = await client.post("/api/embed", json=BODY, headers=headers)
                assert answer.status_code == 200, key
        for wrong in ("alice", "alice=alice-key", digest("bob-key"), f"sha256:{digest('bob-key')}"):
            answer = await client.post("/api/embed", json=BODY, headers={"X-API-Key": wrong})
            assert answer.status_code == 401
        both = bearer("wrong") | {"X-API-Key": "alice-key"}
        assert (await client.post("/api/embed", json=BODY, headers=both)).status_code == 200
        text = (await client.get("/metrics")).text
        for name in names.values():
            assert f'inference_requests_by_key_total{{key="{name}",status="200"}}' in text
        assert not any(key in text for key in names)


async def test_keys_that_are_not_ascii(serve: Serve, tmp_path: Path) -> None:
    """A key is its bytes in UTF-8."""
    (tmp_path / "keys").write_text("name=geheimnis-ß\n", "utf-8")
    async with serve(api_keys=(f"@{tmp_path}/keys",)) as client:
        headers = {b"X-API-Key": "geheimnis-ß".encode()}
        answer = await client.post("/api/embed", json=BODY, headers=headers)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("alice=secret word", "line 2: a key has no spaces"),
        ("alice = secret", "line 2: a key has no spaces"),
        ("alice=sha256:secret", "line 2: 64 hexadecimal digits must follow sha256:"),
    ],
)
def test_mistakes_are_found_and_not_shown(tmp_path: Path, line: str, said: str) -> None:
    """The line is named, what it says is not."""
    (tmp_path / "keys").write_text(f"# keys\n{line}\n")
    with pytest.raises(SettingsError, match=said) as caught:
        Keys((f"@{tmp_path}/keys",))
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="key 2: "):
        Keys(("good", line))


async def test_files_are_read_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is added works without a restart, one that is gone does not."""
    # A second is long in a test.
    monkeypatch.setattr(keys, "follow", partial(follow, seconds=0.02))
    path = tmp_path / "keys"
    path.write_text("old=old-key\n")

    async def until(key: str, status: int) -> None:
        async with asyncio.timeout(10):
            while (await client.get("/api/embedders", headers=bearer(key))).status_code != status:
                await asyncio.sleep(0.01)

    async with serve(api_keys=(f"@{path}", "fixed=fixed-key")) as client:
        await until("old-key", 200)
        path.write_text("new=new-key\n")
        await until("new-key", 200)
        await until("old-key", 401)
        path.write_text("# nobody\n")
        await asyncio.sleep(0.2)
        await until("new-key", 200)
        await until("fixed-key", 200)
