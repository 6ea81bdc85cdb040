"""Bodies that strangers send on purpose, to a real server, which is none the worse for them.

Damaged encodings and wrong types on every route are in `tests/api`, what is no HTTP and what stops
half-way in `test_connection`, bombs in `test_server`.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.process import Server, server

MARK = "xyzzymark"
"""Is in texts and names below, and nowhere in the log."""
EMBED, BATCH, RERANK, OPENAI = "/api/embed", "/api/embed/batch", "/api/rerank", "/v1/embeddings"
TEI, COHERE = "/embed", "/v2/embed"
JSON = {"Content-Type": "application/json"}


def embed(text: bytes, more: bytes = b"") -> bytes:
    """A native request whose text is written so."""
    return b'{"model":"tiny","text":"%s"%s}' % (text, more)


def named(model: str) -> bytes:
    """A request of a model."""
    return json.dumps({"model": model, "input": "a"}).encode()


def given(**fields: Any) -> bytes:
    """A request of the model with these fields."""
    return json.dumps({"model": "tiny"} | fields).encode()


HOSTILE: list[tuple[str, str, bytes, int]] = [
    ("invalid UTF-8", EMBED, embed(b"\xc3\x28"), 400),
    ("overlong UTF-8", EMBED, embed(b"\xc0\xaf"), 400),
    ("a surrogate in UTF-8", EMBED, embed(b"\xed\xa0\x80"), 400),
    ("a lone surrogate", EMBED, embed(rb"\ud800"), 400),
    ("a lone low surrogate", OPENAI, b'{"model":"tiny","input":["\\udc00"]}', 400),
    ("a half pair", EMBED, embed(rb"\ud83dx"), 400),
    ("a whole pair", EMBED, embed(rb"\ud83d\ude00"), 200),
    ("a byte order mark", EMBED, b"\xef\xbb\xbf" + embed(b"a"), 400),
    ("UTF-16", EMBED, embed(b"a").decode().encode("utf-16"), 400),
    ("a bare NUL", EMBED, embed(b"a\0b"), 400),
    ("an escaped NUL", EMBED, embed(rb"a\u0000b"), 200),
    ("NULs", EMBED, embed(rb"\u0000" * 10_000), 200),
    ("control characters", EMBED, embed(rb"\u001b[31m\r\n\u202e\ufeff"), 200),
    ("10 MB of one token", EMBED, embed(b"a" * 10_000_000), 200),
    ("10 MB, not to be cut", EMBED, embed(b"a " * 5_000_000, b',"truncate":false'), 400),
    ("10 MB of spaces", EMBED, embed(b" " * 10_000_000), 200),
    ("10 MB of marks on a letter", EMBED, embed("a\u0301".encode() * 3_300_000), 200),
    ("10 MB of query", RERANK, given(query="a" * 10_000_000, documents=["a"]), 200),
    ("2,048 empty texts", OPENAI, given(input=[""] * 2048), 200),
    ("2,049 empty texts", OPENAI, given(input=[""] * 2049), 400),
    ("2,048 empty texts at once, natively", BATCH, given(texts=[""] * 2048), 400),
    ("1,001 empty documents", RERANK, given(query="", documents=[""] * 1001), 400),
    ("deep JSON where any may be", EMBED, embed(b"a", b',"x":' + b"[" * 5000 + b"]" * 5000), 400),
    ("deep objects", EMBED, embed(b"a", b',"x":' + b'{"a":' * 5000 + b"1" + b"}" * 5000), 400),
    ("deep JSON where texts are", OPENAI, given(input=[[[[["a"]]]]]), 400),
    ("duplicate keys", EMBED, b'{"model":"none","model":"tiny","text":"a","text":"b"}', 200),
    ("duplicate keys, wrong", EMBED, b'{"model":"tiny","text":"a","text":7}', 400),
    ("100,000 unknown keys", EMBED, embed(b"a", b',"x":1' * 100_000), 200),
    ("a huge integer", EMBED, embed(b"a", b',"dimensions":' + b"9" * 4000), 400),
    ("a huge integer of no meaning", EMBED, embed(b"a", b',"x":' + b"9" * 100_000), 200),
    ("a huge exponent", EMBED, embed(b"a", b',"dimensions":1e999999999'), 400),
    ("minus", EMBED, embed(b"a", b',"dimensions":-9223372036854775809'), 400),
    ("a token id beyond 64 bits", OPENAI, given(input=[2**64]), 400),
    ("a negative token id", OPENAI, given(input=[[-1]]), 400),
    ("NaN", EMBED, embed(b"a", b',"dimensions":NaN'), 400),
    ("Infinity", EMBED, embed(b"a", b',"timeout_ms":-Infinity'), 400),
    ("a name that climbs", EMBED, named(f"../../../etc/{MARK}"), 400),
    ("a name that climbs, encoded", EMBED, named(f"..%2f..%2f{MARK}"), 400),
    ("an absolute name", OPENAI, named(f"/etc/{MARK}"), 404),
    ("a name in lines", EMBED, named(f'a\r\nX-Evil: {MARK}\n{{"level":"error"}}'), 400),
    ("a name of 10 KB", EMBED, named(MARK + "a" * 10_240), 400),
    ("a name of 10 MB", COHERE, json.dumps({"model": "a" * 10_000_000, "texts": []}).encode(), 404),
    ("a name with NUL", EMBED, named(f"tiny\0{MARK}"), 400),
    ("a name in other clothes", EMBED, named("ｔｉｎｙ"), 400),  # noqa: RUF001 - that is the point
    ("no name", EMBED, named(""), 400),
    ("texts of another kind", TEI, b'{"inputs":[["a",["b"]]]}', 422),
    ("a prompt of 10 MB", EMBED, embed(b"a", b',"prompt":"' + b"a" * 10_000_000 + b'"'), 400),
    ("a format as long", EMBED, embed(b"a", b',"encoding_format":"' + b"a" * 100_000 + b'"'), 400),
]
SHAPES = {OPENAI: {"error"}, TEI: {"error", "error_type"}, COHERE: {"id", "message"}}
LONGEST_REFUSAL = 5_000
"""Bytes: of what was wrong little is said back, but for a number of 4,000 digits."""


def milliseconds(running: Server) -> float:
    """The median time of a short text."""
    took = []
    for _ in range(15):
        began = time.perf_counter()
        assert running.post(EMBED, content=embed(b"a"), headers=JSON).status_code == 200
        took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)


@pytest.fixture
def running(models: Path, cache: Path) -> Iterator[Server]:
    """A server of the tiny model."""
    flags = ["--model-path", str(models), "--allowed-embedding-models", "tiny"]
    flags += ["--allowed-rerank-models", "tiny", "--cache-dir", str(cache), "--warmup-ms", "0"]
    with server(*flags) as one:
        one.until("/health/ready")
        yield one


def test_hostile_bodies(running: Server) -> None:
    """Each gets an answer in its dialect's shape; nothing is logged, leaked, or slower for it."""
    before = milliseconds(running)
    for name, path, content, status in HOSTILE:
        answer = running.post(path, content=content, headers=JSON)
        assert answer.status_code == status, (name, answer.text[:500])
        assert answer.headers["content-type"] == "application/json", name
        assert len(answer.headers) < 30, name
        body = answer.json()
        if status == 200:
            continue
        assert set(body) == SHAPES.get(path, {"error", "code", "request_id"}), name
        assert len(answer.content) < LONGEST_REFUSAL, name
        for secret in ("Traceback", "embedding_server", "msgspec", "/usr", "File "):
            assert secret not in answer.text, name
    assert milliseconds(running) < 3 * before + 20
    running.process.terminate()
    log, _ = running.process.communicate(timeout=30)
    lines = [msgspec.json.decode(line) for line in log.splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    assert MARK not in log
    assert len(lines) > len(HOSTILE)
