"""Failures that are not the request's fault, and the framework's own, in the contract's shape."""

import asyncio
import re
from typing import Any

import pytest

from embedding_server.api.parts import Parts
from embedding_server.core import Precision
from embedding_server.runtime.errors import DeviceLostError
from embedding_server.runtime.session import Threads
from embedding_server.serving import device
from embedding_server.serving.model import Model
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN

BODY = {"model": "tiny", "text": "a"}


def model_of(client: Client, name: str = "tiny") -> Model:
    """A resident model of an application."""
    model = parts_of(client).engine.registry.residents[name].model
    assert model is not None
    return model


class Broken:
    """A session that fails on every run."""

    provider = "BrokenExecutionProvider"
    precision = Precision.FP32
    padded = False
    has_wide = False
    costs_above = 0
    resident_bytes = 1
    threads = Threads()

    def run(self, texts: Any, **_: Any) -> Any:
        """See `Session`."""
        raise ValueError("/secret/path: CUDA error 700")

    def sample(self, tokens: int) -> Any:
        """See `Session`."""
        raise NotImplementedError


class Lost(Broken):
    """A session whose GPU is gone."""

    def run(self, texts: Any, **_: Any) -> Any:
        """See `Session`."""
        raise DeviceLostError("CUDA failure 700: an illegal memory access was encountered")


class Stuck(FakeSession):
    """A session whose runs wait for `release()`."""

    def __init__(self) -> None:
        super().__init__(width=HIDDEN)
        self.block()


@pytest.fixture
def broken(client: Client) -> Client:
    """An application whose model fails."""
    model_of(client).batcher.session = Broken()
    return client


async def test_a_lost_gpu(client: Client) -> None:
    """Its requests are refused, and counted so: another server may answer them."""
    model_of(client).batcher.session = Lost()
    pair = {"model": "tiny", "query": "a", "documents": ["b"]}
    asked = {"/api/embed": {"model": "tiny", "text": "a"}, "/api/rerank": pair}
    for path, body in asked.items():
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert "a GPU is lost" in answer.json()["error"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    metrics = (await client.get("/metrics")).text
    assert 'inference_rejections_total{reason="draining"} 2.0' in metrics


async def test_unknown_paths_and_methods(client: Client) -> None:
    """404 and 405 come in the contract's shape, with a request id."""
    answer = await client.get("/nope")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("Not found: ")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    answer = await client.get("/api/embed")
    assert answer.status_code == 405
    assert answer.json()["code"] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize("path", ["/", "//embed", "/embed"])
async def test_failures_of_root(client: Client, path: str) -> None:
    """TEI's clients post to `/`, and with a slash too many: failures come in TEI's shape."""
    answer = await client.post(path, json={"inputs": 1})
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "error_type"}
    parts_of(client).engine.queue.draining = True
    answer = await client.post(path, json={"inputs": "a"})
    assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
    assert "code" in (await client.get("/nope")).json()


async def test_model_failure(broken: Client) -> None:
    """A failing model is a 500 of its task that leaks nothing."""
    answer = await broken.post("/api/embed", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["code"] == "EMBEDDING_ERROR"
    assert answer.json()["error"].startswith("Embedding generation failed: ")
    assert "secret" not in answer.text
    answer = await broken.post(
        "/api/rerank", json={"model": "tiny", "query": "a", "documents": ["b"]}
    )
    assert answer.json()["code"] == "RERANK_ERROR"
    assert answer.json()["error"].startswith("Reranking failed: ")
    assert (
        await broken.post("/api/embed", json={"model": "other", "text": "a"})
    ).status_code == 200


async def test_defect_of_ours(client: Client) -> None:
    """An exception nobody expected is a 500 that names the request id and nothing else."""
    model_of(client).estimate = None  # type: ignore[method-assign,assignment]
    answer = await client.post("/api/embed", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["code"] == "INTERNAL_ERROR"
    assert "NoneType" not in answer.text


async def test_hung_run(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over the watchdog's limit turns readiness 503, which says so; liveness stays 200."""
    monkeypatch.setattr(device, "_WATCHDOG_SECONDS", 0.0)
    monkeypatch.setattr(device, "_WATCHDOG_FACTOR", 0.0)
    session = Stuck()
    model_of(client).batcher.session = session
    request = asyncio.create_task(client.post("/api/embed", json=BODY))
    await asyncio.to_thread(session.running.acquire, timeout=10)
    answer = await client.get("/health/ready")
    assert answer.status_code == 503
    assert "a model run hangs" in answer.json()["reasons"][0]
    assert (await client.get("/health/live")).status_code == 200
    session.release()
    assert (await request).status_code == 200
    assert (await client.get("/health/ready")).status_code == 200


async def test_client_deadline(client: Client) -> None:
    """The client's own deadline is a 504, and its texts leave the line."""
    session = Stuck()
    model_of(client).batcher.session = session
    answer = await client.post("/api/embed", json=BODY | {"timeout_ms": 20})
    assert answer.status_code == 504
    assert answer.json()["code"] == "DEADLINE_EXCEEDED"
    assert re.search(
        r"not done within 0\.02 s: \d+ ms waiting for the model to load, \d+ ms waiting for"
        r" admission, \d+ ms tokenising, \d+ ms in the model's queue and runs",
        answer.json()["error"],
    )
    session.release()
    assert "inside=0" in repr(parts_of(client).engine.queue)


async def test_deadline_in_line(serve: Serve) -> None:
    """A deadline that passes in line says so, and the request is never tokenised nor run."""
    async with serve(max_concurrent_requests=1) as client:
        session = Stuck()
        model_of(client).batcher.session = session
        inside = asyncio.create_task(client.post("/api/embed", json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        answer = await client.post("/api/embed", json=BODY | {"timeout_ms": 20})
        assert answer.status_code == 504
        assert re.search(r"\d\d ms waiting for admission$", answer.json()["error"])
        session.release()
        assert (await inside).status_code == 200
        text = (await client.get("/metrics")).text
        assert 'inference_tokenize_seconds_count{model="tiny"} 1.0' in text
        assert len(session.batches) == 1


async def test_deadline_header(client: Client) -> None:
    """`X-Request-Timeout-Ms` says the same as the field."""
    session = Stuck()
    model_of(client).batcher.session = session
    answer = await client.post("/api/embed", json=BODY, headers={"X-Request-Timeout-Ms": "20"})
    assert answer.status_code == 504
    for wrong in ("0", "-1", "soon", "9" * 400, "9" * 5000):
        answer = await client.post("/api/embed", json=BODY, headers={"X-Request-Timeout-Ms": wrong})
        assert answer.status_code == 400
    session.release()


async def test_server_deadline(serve: Serve) -> None:
    """The server's own limit is a 503 with a time to come back."""
    async with serve(request_timeout_ms=20) as client:
        session = Stuck()
        model_of(client).batcher.session = session
        answer = await client.post("/api/embed", json=BODY)
        assert answer.status_code == 503
        assert answer.json()["code"] == "SERVICE_UNAVAILABLE"
        session.release()


async def test_overload(serve: Serve) -> None:
    """A full line is a 503 with `Retry-After`, and the headers show the line."""
    async with serve(max_concurrent_requests=1, max_queue_depth=1) as client:
        session = Stuck()
        model_of(client).batcher.session = session
        inside = asyncio.create_task(client.post("/api/embed", json=BODY))
        await asyncio.to_thread(session.running.acquire, timeout=10)
        waiting = asyncio.create_task(client.post("/api/embed", json=BODY))
        while not parts_of(client).engine.queue.depth:
            await asyncio.sleep(0.001)
        refused = await client.post("/api/embed", json=BODY)
        assert refused.status_code == 503
        assert refused.json()["code"] == "SERVICE_UNAVAILABLE"
        assert refused.json()["error"].startswith("Service unavailable: ")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
        assert refused.headers["x-queue-depth"] == "1"
        session.release()
        await asyncio.gather(inside, waiting)
        metrics = (await client.get("/metrics")).text
        assert 'inference_rejections_total{reason="queue_full"} 1.0' in metrics


async def test_loading_model(serve: Serve) -> None:
    """A model whose file is damaged is a 503 MODEL_LOAD_ERROR, and readiness says why."""
    async with serve(preload=("tiny",)) as client:
        here: Parts = parts_of(client)
        spec = here.engine.catalog.models["other"]
        weights = spec.directory / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        try:
            answer = await client.post("/api/embed", json={"model": "other", "text": "a"})
        finally:
            weights.write_bytes(whole)
        assert answer.status_code == 503
        assert answer.json()["code"] == "MODEL_LOAD_ERROR"
        assert answer.json()["error"].startswith("Failed to load model: ")
        assert int(answer.headers["retry-after"]) >= 1
        status = (await client.get("/health/status")).json()
        assert status["models"]["other"]["state"] == "failed"
        assert "model.safetensors" in status["models"]["other"]["error"]


async def test_draining(client: Client) -> None:
    """A draining server answers probes, refuses work politely and asks to close connections."""
    client.app.drain()
    answer = await client.post("/api/embed", json=BODY)
    assert answer.status_code == 503
    assert answer.headers["connection"] == "close"
    ready = await client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["reasons"] == ["the server is shutting down"]
    assert (await client.get("/health/live")).status_code == 200
