"""The way in: encodings, limits and damaged bodies."""

import gc
import gzip
import json
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from embedding_server.api.body import ByteBudget
from embedding_server.errors import ServiceUnavailable
from embedding_server.observability.metrics import Metrics
from tests.conftest import Client, Serve, parts_of

BODY = json.dumps({"model": "tiny", "input": ["the of and"] * 10}).encode()
JSON = {"Content-Type": "application/json"}


async def post(client: httpx.AsyncClient, body: bytes, **headers: str) -> httpx.Response:
    """POST raw bytes to `/api/embed`."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/api/embed", content=body, headers=JSON | more)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("zstd", zstd.compress(BODY)),
        ("zstd", zstd.compress(BODY, options={zstd.CompressionParameter.content_size_flag: 0})),
        ("identity", BODY),
    ],
)
async def test_encodings(client: Client, encoding: str, body: bytes) -> None:
    """Gzip and zstd bodies give the answer of the plain one."""
    plain = await post(client, BODY)
    assert plain.status_code == 200
    assert (await post(client, body, content_encoding=encoding)).content == plain.content


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(BODY)[:-20]),
        ("gzip", gzip.compress(BODY) + b"more"),
        ("zstd", b"no zstd"),
        ("zstd", zstd.compress(BODY)[:-5]),
    ],
)
async def test_damaged_encodings(client: Client, encoding: str, body: bytes) -> None:
    """A damaged body is a 400 that names its encoding."""
    answer = await post(client, body, content_encoding=encoding)
    assert answer.status_code == 400
    assert f"the {encoding} body is damaged" in answer.json()["error"]


async def test_unknown_encoding_and_type(client: Client) -> None:
    """Other encodings and media types are a 415 that says what works."""
    answer = await post(client, BODY, content_encoding="br")
    assert answer.status_code == 415
    assert "must be gzip or zstd" in answer.json()["error"]
    answer = await client.post("/api/embed", content=BODY, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert answer.json()["code"] == "UNSUPPORTED_MEDIA_TYPE"
    answer = await post(client, BODY, content_type="application/json; charset=utf-8")
    assert answer.status_code == 200


async def test_zstd_windows(client: Client) -> None:
    """RFC 9659: a body whose reader would need more than 8 MiB to look back at is refused."""
    for log, status in ((23, 200), (24, 400), (27, 400)):
        stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
        body = stream.compress(BODY) + stream.flush()
        answer = await post(client, body, content_encoding="zstd")
        assert answer.status_code == status, answer.text


async def test_size_limit(serve: Serve) -> None:
    """The limit holds for declared, streamed and decompressed sizes."""

    async def stream() -> AsyncIterator[bytes]:
        for at in range(0, len(BODY), 50):
            yield BODY[at : at + 50]

    bomb = gzip.compress(b'{"model":"tiny","input":"' + b"a" * 1_000_000 + b'"}')
    async with serve(max_body_bytes=len(BODY)) as client:
        assert (await post(client, BODY)).status_code == 200
        assert (await client.post("/api/embed", content=stream(), headers=JSON)).status_code == 200
        for answer in (
            await post(client, BODY + b" "),
            await post(client, bomb, content_encoding="gzip"),
            await post(client, zstd.compress(BODY + b" "), content_encoding="zstd"),
        ):
            assert answer.status_code == 413
            assert answer.json()["code"] == "PAYLOAD_TOO_LARGE"
    async with serve(max_body_bytes=len(BODY) - 1) as client:
        assert (await client.post("/api/embed", content=stream(), headers=JSON)).status_code == 413


async def test_repetition(client: Client) -> None:
    """Beyond 512 KiB a body may become a hundred times as long as it is, and no longer."""
    none = {zstd.CompressionParameter.content_size_flag: 0}
    varied = "".join(map(str, range(300_000)))
    for text, status in (("a" * 500_000, 200), ("a" * 1_000_000, 413), (varied, 200)):
        plain = json.dumps({"model": "tiny", "input": text}).encode()
        for encoding, body in (
            ("gzip", gzip.compress(plain)),
            ("zstd", zstd.compress(plain)),
            ("zstd", zstd.compress(plain, options=none)),  # type: ignore[arg-type]
        ):
            answer = await post(client, body, content_encoding=encoding)
            assert answer.status_code == status, answer.text
            assert status == 200 or "over 100 times its size" in answer.json()["error"]
        assert (await post(client, plain)).status_code == 200


async def test_values(client: Client) -> None:
    """No more values than anybody needs are made of a body; commas in texts are none."""
    for values in (b"1,", b"[],", b'"a",', b'"\\\\",', b'"]" ,', b'{"a":0},'):
        body = b'{"model":"tiny","input":[' + values * (1 << 19) + b"1]}"
        answer = await client.post("/v1/embeddings", content=body, headers=JSON)
        assert answer.status_code == 413, values
        assert "over 524288 values" in answer.json()["error"]["message"]
    body = json.dumps({"model": "tiny", "input": ['",\\,[],' * 300_000]}).encode()
    assert (await post(client, body)).status_code == 200
    assert gc.isenabled()


async def test_byte_budget(client: Client) -> None:
    """More request bytes than may be inside are refused, and the budget is given back."""
    budget = ByteBudget(100, parts_of(client).engine.queue, Metrics("test"))
    with budget.account() as charge, budget.account() as other:
        charge(60)
        with pytest.raises(ServiceUnavailable, match="too many request bytes"):
            other(50)
        other(40)
        assert repr(budget) == "ByteBudget(used=100, limit=100)"
    assert repr(budget) == "ByteBudget(used=0, limit=100)"


async def test_body_that_never_fits(serve: Serve) -> None:
    """A body over the whole budget is too large, not a reason to come back."""
    async with serve(max_queued_bytes=len(BODY)) as client:
        assert (await post(client, BODY)).status_code == 200
        assert (await post(client, BODY + b"  ")).status_code == 413
        assert (await post(client, BODY)).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "needs a JSON object"),
        (b"{", "truncated"),
        (b"null", "Expected `object`"),
        (b'{"model":"\xff"}', "utf-8"),
        (b"[" * 100_000, "Expected `object`"),
        (b'{"model":"tiny","x":' + b"[" * 100_000, "nested too deeply"),
        (b'{"model":"tiny","text":"a","dimensions":1e999}', "dimensions"),
        (b'{"model":"tiny","text":NaN}', "invalid character"),
    ],
)
async def test_damaged_json(client: Client, body: bytes, said: str) -> None:
    """Whatever is no JSON of the right shape is a 400 that says so."""
    answer = await post(client, body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "BAD_REQUEST"
    assert said in answer.json()["error"]
