"""Traces as a real OTLP collector gets them, from an application in this process."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from embedding_server.errors import SettingsError
from embedding_server.observability.otlp import open_tracer
from embedding_server.observability.spans import Span as OwnSpan
from embedding_server.observability.tracing import Tracer
from embedding_server.settings import Settings
from tests.collector import Collector, Span, collector, values
from tests.conftest import Client, Serve
from tests.fakes import FakeSession
from tests.test_cancellation import Caller, use
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "input": ["the of and", "a"]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ERROR, UNSET = 2, 0

ANSWERED: list[Any] = [("admission", []), ("tokenize", []), ("queue", []), ("run", [])]


@pytest.fixture
def sink() -> Iterator[Collector]:
    """A collector."""
    with collector() as sink:
        yield sink


@asynccontextmanager
async def traced(serve: Serve, sink: Collector, **settings: Any) -> AsyncIterator[Client]:
    """An application that sends `sink` its traces; all of them are there at the end."""
    wanted: dict[str, Any] = {"otel_enabled": True, "otel_endpoint": sink.endpoint} | settings
    async with serve(**wanted) as client:
        yield client


def root(sink: Collector) -> Span:
    """The one span of a request."""
    (found,) = (span for span in sink.spans if span.kind == 2)
    return found


def traceparent(flags: str = "01") -> dict[str, str]:
    """A client's header."""
    return {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}


async def test_embed(serve: Serve, sink: Collector) -> None:
    """An embed request is one tree below the client's span, and every span says what it must."""
    async with traced(serve, sink, service_name="shop") as client:
        answer = await client.post("/api/embed", json=BODY, headers=traceparent())
        assert answer.status_code == 200
    assert sink.resources[0]["service.name"] == "shop"
    tree = [("embeddings tiny", ANSWERED), ("encode", [])]
    assert sink.tree(bytes.fromhex(TRACE)) == [("POST /api/embed", tree)]
    top = root(sink)
    assert top.parent_span_id.hex() == PARENT
    assert (top.status.code, top.status.message) == (UNSET, "")
    assert values(top.attributes) == {
        "http.request.method": "POST",
        "http.route": "/api/embed",
        "url.path": "/api/embed",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "http.response.status_code": 200,
        "http.response.body.size": len(answer.content),
        "client.address": "127.0.0.1",
        "client.port": 123,
        "server.address": "test",
        "user_agent.original": httpx.Client().headers["user-agent"],
        "inference.request_id": answer.headers["x-request-id"],
    }
    (call,) = sink.named("embeddings tiny")
    assert values(call.attributes) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "embedding_server",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 8,
        "inference.texts": 2,
        "inference.truncated": 0,
    }
    (run,) = sink.named("run")
    assert values(run.attributes) == {
        "gen_ai.request.model": "tiny",
        "inference.provider": "CPUExecutionProvider",
        "inference.precision": "fp32",
        "inference.fallback": False,
        "inference.batch.requests": 1,
        "inference.batch.texts": 2,
        "inference.batch.tokens": 8,
        "inference.batch.padded_tokens": 10,
    }
    assert_nested(sink)


def assert_nested(sink: Collector) -> None:
    """Children lie within their parents, and the stages of a call follow each other."""
    spans = {span.span_id: span for span in sink.spans}
    for span in sink.spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if parent := spans.get(span.parent_span_id):
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
    for before, after in (("admission", "tokenize"), ("tokenize", "queue"), ("queue", "run")):
        for one, other in zip(sink.named(before), sink.named(after), strict=False):
            assert one.end_time_unix_nano <= other.start_time_unix_nano


async def test_rerank(serve: Serve, sink: Collector) -> None:
    """A rerank request is a tree of the same form; it is sampled without the client's word."""
    body = {"model": "tiny", "query": "the", "documents": ["a", "of"]}
    async with traced(serve, sink) as client:
        assert (await client.post("/api/rerank", json=body)).status_code == 200
    tree = [("rerank tiny", ANSWERED), ("encode", [])]
    top = root(sink)
    assert sink.tree(top.trace_id) == [("POST /api/rerank", tree)]
    assert not top.parent_span_id
    (call,) = sink.named("rerank tiny")
    assert values(call.attributes)["gen_ai.operation.name"] == "rerank"


async def test_score(serve: Serve, sink: Collector) -> None:
    """Pairs of other dialects are one call, too."""
    body = {"model": "tiny", "text_1": ["the", "a"], "text_2": ["of", "and"]}
    async with traced(serve, sink) as client:
        assert (await client.post("/v1/score", json=body)).status_code == 200
    tree = [("rerank tiny", ANSWERED), ("encode", [])]
    assert sink.tree(root(sink).trace_id) == [("POST /v1/score", tree)]
    assert_nested(sink)


async def test_batch_links_to_its_requests(serve: Serve, sink: Collector) -> None:
    """A run of several requests is a trace of its own that links to each, and they to it."""
    session = FakeSession(width=HIDDEN)
    session.block()
    async with traced(serve, sink, threads=1) as client:
        use(client, session)
        first = asyncio.create_task(client.post("/api/embed", json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        others = [asyncio.create_task(client.post("/api/embed", json=BODY)) for _ in range(3)]
        await asyncio.sleep(0.05)
        session.release()
        await asyncio.gather(first, *others)
    alone, together = sorted(sink.named("batch tiny"), key=lambda span: span.start_time_unix_nano)
    assert (len(alone.links), len(together.links)) == (1, 3)
    said = values(together.attributes)
    assert (said["inference.batch.requests"], said["inference.batch.texts"]) == (3, 6)
    runs = {span.span_id: span for span in sink.named("run")}
    roots = {span.trace_id for span in sink.named("POST /api/embed")}
    assert len(roots) == 4
    for batch in (alone, together):
        assert batch.trace_id not in roots
        for link in batch.links:
            assert link.trace_id in roots
            (back,) = runs[link.span_id].links
            assert (back.trace_id, back.span_id) == (batch.trace_id, batch.span_id)
    assert_nested(sink)


async def test_a_request_in_several_runs(serve: Serve, sink: Collector) -> None:
    """Texts that do not fit into one batch make a span per run."""
    body = {"model": "tiny", "input": ["the of and"] * 20}
    async with traced(serve, sink, threads=1, max_batch_tokens=16) as client:
        assert (await client.post("/api/embed", json=body)).status_code == 200
    runs = sink.named("run")
    assert len(runs) > 3
    assert len(sink.named("batch tiny")) == len(runs)
    assert len(sink.named("queue")) == 1


@pytest.mark.parametrize(
    ("body", "error", "where"),
    [
        ({"model": "gpt-5", "text": "a"}, "UNSUPPORTED_MODEL", "embeddings"),
        ({"model": "tiny"}, "BAD_REQUEST", ""),
        ({"model": "tiny", "text": "a b " * 50, "truncate": False}, "BAD_REQUEST", "tokenize"),
    ],
)
async def test_wrong_requests(
    serve: Serve, sink: Collector, body: dict[str, Any], error: str, where: str
) -> None:
    """A client's mistake has its code, where it was found too, and is no error of the server."""
    async with traced(serve, sink) as client:
        assert (await client.post("/api/embed", json=body)).status_code == 400
    top = root(sink)
    assert values(top.attributes)["error.type"] == error
    assert top.status.code == UNSET
    found = [span for span in sink.spans if "error.type" in values(span.attributes)]
    assert [span.name for span in found if span is not top][-1:] == [where] * bool(where)
    assert all(span.status.code == UNSET and not span.events for span in sink.spans)


async def test_refused_before_the_first_stage(
    serve: Serve, sink: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that got nowhere has no stages, and telling of it does not fail."""
    async with traced(serve, sink) as client:
        await client.post("/api/embed", json={"model": "gpt-5", "text": "a"})
    assert {span.name for span in sink.spans} == {"POST /api/embed", "embeddings"}
    assert not caplog.records  # the event loop's, of a callback that failed


async def test_model_that_fails(serve: Serve, sink: Collector) -> None:
    """A failed run is an error of the run, the call and the request, without its message."""
    async with traced(serve, sink) as client:
        use(client, FakeSession(width=HIDDEN, poison=2))
        assert (await client.post("/api/embed", json=BODY)).status_code == 500
    failed = {span.name: span.status for span in sink.spans if span.status.code == ERROR}
    assert {name: one.message for name, one in failed.items()} == {
        "POST /api/embed": "EMBEDDING_ERROR",
        "embeddings tiny": "EMBEDDING_ERROR",
        "run": "ValueError",
        "batch tiny": "ValueError",
    }


async def test_refusals(serve: Serve, sink: Collector) -> None:
    """A request that is refused, by the guard or in line, is an error with the refusal's reason."""
    session = FakeSession(width=HIDDEN)
    session.block()
    async with traced(
        serve, sink, max_concurrent_requests=1, max_queue_depth=0, otel_sample_ratio=0
    ) as client:
        use(client, session)
        inside = asyncio.create_task(client.post("/api/embed", json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        answer = await client.post("/api/embed", json=BODY, headers=traceparent())
        assert answer.status_code == 503
        client.app.drain()
        late = {"traceparent": f"00-{TRACE[::-1]}-{PARENT}-01"}
        assert (await client.post("/api/embed", json=BODY, headers=late)).status_code == 503
        session.release()
        assert (await inside).status_code == 200
    (tree,) = sink.tree(bytes.fromhex(TRACE))
    assert tree == ("POST /api/embed", [("embeddings tiny", [("admission", [])])])
    full = [span for span in sink.spans if span.trace_id.hex() == TRACE]
    assert {span.status.message for span in full} == {"queue_full"}
    assert sink.tree(bytes.fromhex(TRACE[::-1])) == [("POST /api/embed", [])]
    assert {span.trace_id.hex() for span in sink.spans} == {TRACE, TRACE[::-1]}
    assert all(span.status.code == ERROR for span in sink.spans)
    assert all("inference.reason" in values(span.attributes) for span in sink.spans)


async def test_deadline(serve: Serve, sink: Collector) -> None:
    """A request that passes its deadline while it runs is an error up to the run it waited for."""
    session = FakeSession(width=HIDDEN)
    session.block()
    async with traced(serve, sink) as client:
        use(client, session)
        answer = await client.post("/api/embed", json=BODY | {"timeout_ms": 50})
        assert answer.status_code == 504
        session.release()
    tree = [("POST /api/embed", [("embeddings tiny", ANSWERED)])]
    assert sink.tree(root(sink).trace_id) == tree
    failed = {span.name: span.status.message for span in sink.spans if span.status.code == ERROR}
    named = ("POST /api/embed", "embeddings tiny", "run")
    assert {name: failed[name] for name in named} == dict.fromkeys(named, "DEADLINE_EXCEEDED")
    assert_nested(sink)


async def test_client_that_leaves(serve: Serve, sink: Collector) -> None:
    """A request whose client left ends as cancelled, which is no error."""
    session = FakeSession(width=HIDDEN)
    session.block()
    async with traced(serve, sink, threads=1) as client:
        use(client, session)
        caller = Caller(client)
        await asyncio.to_thread(session.running.acquire, timeout=10)
        waiting = Caller(client)
        await asyncio.sleep(0.01)
        for one in (waiting, caller):
            one.hang_up()
            await one.task
        session.release()
    roots = sink.named("POST /api/embed")
    assert len(roots) == 2
    for top, last in zip(roots, ("queue", "run"), strict=True):
        assert "http.response.status_code" not in values(top.attributes)
        spans = [span for span in sink.spans if span.trace_id == top.trace_id]
        ended = [span for span in spans if values(span.attributes).get("error.type") == "cancelled"]
        assert {span.name for span in ended} == {"POST /api/embed", "embeddings tiny", last}
        assert all(span.status.code == UNSET for span in spans)


async def test_loading_is_a_span(serve: Serve, sink: Collector) -> None:
    """A request that waits for its model to load says so."""
    async with traced(serve, sink, preload=("other",)) as client:
        assert (await client.post("/api/embed", json=BODY)).status_code == 200
    tree = [("embeddings tiny", [("load", []), *ANSWERED]), ("encode", [])]
    assert sink.tree(root(sink).trace_id) == [("POST /api/embed", tree)]


async def test_what_is_not_traced(serve: Serve, sink: Collector) -> None:
    """Probes are not, nor is what the client does not want traced, nor more than the ratio."""
    async with traced(serve, sink, otel_sample_ratio=0.0) as client:
        await client.get("/health/ready", headers=traceparent())
        await client.get("/metrics", headers=traceparent())
        await client.post("/api/embed", json=BODY)
    async with traced(serve, sink) as client:
        await client.post("/api/embed", json=BODY, headers=traceparent("00"))
    assert sink.spans == []


async def test_unknown_paths_and_methods(serve: Serve, sink: Collector) -> None:
    """What a client makes up is in no name and no attribute."""
    async with traced(serve, sink) as client:
        await client.get("/no/such/path?q=made-up")
        await client.request("MADEUP", "/api/embed")
        await client.get("/v1/models/made-up")
    names = sorted(span.name for span in sink.spans)
    assert names == ["GET", "GET /v1/models/{id}", "HTTP"]
    assert "made-up" not in str(sink.spans)
    assert "such" not in str(sink.spans)


@pytest.mark.parametrize(
    ("header", "continued"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-03", True),
        (f"cc-{TRACE}-{PARENT}-01-later", True),
        (f"00-{TRACE}-{PARENT}-01-later", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{PARENT}", False),
        ("", False),
    ],
)
def test_traceparent(header: str, continued: bool) -> None:  # noqa: FBT001
    """What W3C's recommendation calls valid is continued, everything else is a trace of our own."""
    trace = Tracer(lambda _: None, 1.0).start(header, 0.0)
    assert trace.sampled
    assert (trace.trace_id == int(TRACE, 16)) is continued
    assert (trace.parent_id == int(PARENT, 16)) is continued


def test_ratio() -> None:
    """About so many are sampled."""
    tracer = Tracer(lambda _: None, 0.25)
    sampled = sum(tracer.start("", 0.0).sampled for _ in range(4000))
    assert 850 < sampled < 1150


async def test_events_carry_ids(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """The log event of a traced request names its span; that of any other has no ids."""
    spans: list[OwnSpan] = []
    async with serve() as client:
        client.app._asgi._tracer = Tracer(spans.extend, 0.0)  # type: ignore[attr-defined]
        await client.post("/api/embed", json=BODY, headers=traceparent())
        await client.post("/api/embed", json=BODY)
    events = [line for line in capsys.readouterr().out.splitlines() if "endpoint=" in line]
    (own,) = (span.own for span in spans if span.is_server and span.parent)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in events]
    assert f"trace_id={TRACE}" in plain[0]
    assert f"span_id={own.span:016x}" in plain[0]
    assert "trace_id" not in plain[1]


def test_grpc_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Its errors, which may hold bytes of anything, do not get into the log."""
    settings = Settings(allowed_embedding_models=(), otel_endpoint="http://127.0.0.1:1")
    _, close = open_tracer(settings)
    logging.getLogger("grpc._cython.cygrpc").error("Invalid encoding on %s", b"\xff")
    close()
    assert not caplog.records


def test_wrong_endpoint() -> None:
    """An address without a scheme would be taken for TLS: it is a mistake at start."""
    settings = Settings(allowed_embedding_models=(), otel_endpoint="localhost:4317")
    with pytest.raises(SettingsError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT='localhost:4317'"):
        open_tracer(settings)
