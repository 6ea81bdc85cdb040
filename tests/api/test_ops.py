"""Health, metrics and the API's description."""

import asyncio
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Client, Serve, parts_of

BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5]
BUCKETS += [1, 2.5, 5, 10, 30, 60, 120, 300]
BODY = {"model": "tiny", "input": ["the of", "and"]}


async def test_health(client: Client) -> None:
    """The four health routes have the contract's fields."""
    while len(parts_of(client).engine.registry.loaded) < 2:
        await asyncio.sleep(0.001)
    assert (await client.get("/health/live")).json() == {"status": "ok"}
    ready = await client.get("/health/ready")
    assert ready.json() == {"status": "ok", "embedding": True, "reranker": True}
    health = (await client.get("/health")).json()
    assert health["cache_info"] == {
        "cached_models": parts_of(client).engine.registry.loaded,
        "num_cached": 2, "max_cached": 0, "cache_ttl": 0,
    }  # fmt: skip
    assert sorted(health["cache_info"]["cached_models"]) == ["other", "tiny"]
    assert (health["status"], health["total_models"], health["loaded_models"]) == ("ok", 2, 2)
    assert health["startup_complete"] is True
    assert health["uptime_seconds"] > 0
    status = (await client.get("/health/status")).json()
    assert status["available_permits"] > 0
    assert (status["total_queue_depth"], status["gpu_vram_pressure"]) == (0, 0)
    model = status["models"]["tiny"]
    assert (model["state"], model["provider"]) == ("ready", "CPUExecutionProvider")
    assert (model["precision"], model["queue"], model["error"]) == ("fp32", 0, "")
    assert model["resident_bytes"] > 10_000
    answer = await client.post("/api/embed", json=BODY)
    assert answer.headers["x-model-fingerprint"] == model["fingerprint"]


async def test_no_reranker(serve: Serve) -> None:
    """Without a rerank list the server is ready and says that it does not rerank."""
    async with serve(allowed_rerank_models=()) as client:
        ready = await client.get("/health/ready")
        assert ready.json() == {"status": "ok", "embedding": True, "reranker": False}


async def test_not_ready_says_why(client: Client) -> None:
    """A dead run slot makes the server not ready."""
    parts_of(client).device.stop()
    ready = await client.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json() == {
        "status": "not_ready", "embedding": False, "reranker": False,
        "reasons": ["the run slots are stopped"],
    }  # fmt: skip


@pytest.mark.parametrize(("policy", "status"), [("all", 503), ("any", 200)])
async def test_ready_policy(serve: Serve, policy: str, status: int) -> None:
    """With one of two models failing, `any` is ready and `all` is not."""
    async with serve(ready_policy=policy) as client:
        registry = parts_of(client).engine.registry
        while len(registry.loaded) < 2:
            await asyncio.sleep(0.001)
        resident = registry.residents["other"]
        resident.state, resident.error = type(resident.state)("failed"), "broken"
        ready = await client.get("/health/ready")
        assert ready.status_code == status
        assert ready.json().get("reasons", []) == (
            ["other: failed (broken)"] if status == 503 else []
        )


async def test_metrics_count_requests(client: Client) -> None:
    """Requests, texts, tokens and batches are counted under the contract's names."""
    await client.post("/api/embed", json=BODY)
    await client.post("/api/embed", json={"model": "nope", "text": "a"})
    assert 'inference_tokens_total{model="tiny"} 7.0' in (await client.get("/metrics")).text
    await client.post("/api/rerank", json={"model": "tiny", "query": "a", "documents": ["b", "c"]})
    text = (await client.get("/metrics")).text
    for line in (
        'inference_embed_requests_total{model="tiny",status="success"} 1.0',
        'inference_embed_requests_total{model="other",status="error"} 1.0',
        'inference_embed_items_total{model="tiny"} 2.0',
        'inference_embed_duration_seconds_count{model="tiny",status="success"} 1.0',
        'inference_embed_per_item_duration_seconds_count{model="tiny",status="success"} 1.0',
        'inference_rerank_requests_total{model="tiny",status="success"} 1.0',
        'inference_rerank_documents_total{model="tiny"} 2.0',
        'inference_http_requests_total{endpoint="/api/embed",method="POST",status="200"} 1.0',
        'inference_http_requests_total{endpoint="/api/embed",method="POST",status="400"} 1.0',
        'inference_model_ready{model="tiny"} 1.0',
        "inference_queue_depth 0.0",
    ):
        assert line in text, line
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)
    assert 'target_info{service_name="embedding-inference-api"' in text
    assert 'endpoint="/metrics"' not in text


async def test_metrics_buckets(client: Client) -> None:
    """Durations use the contract's buckets."""
    await client.post("/api/embed", json=BODY)
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    (family,) = (one for one in families if one.name == "inference_embed_duration_seconds")
    bounds = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
    assert bounds == [str(float(bound)) for bound in BUCKETS] + ["+Inf"]


async def test_metrics_formats(client: Client) -> None:
    """`Accept` chooses between Prometheus text, OpenMetrics and a JSON summary."""
    await client.post("/api/embed", json=BODY)
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    opened = await client.get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.endswith("# EOF\n")
    summary = (await client.get("/metrics", headers={"Accept": "application/json"})).json()
    assert (summary["total_requests"], summary["total_embeddings"]) == (1, 2)
    assert summary["cache_info"]["num_cached"] == 2
    assert summary["uptime_seconds"] > 0


async def test_openapi(client: Client) -> None:
    """The document is OpenAPI 3.1 and declares every status of an inference route."""
    document = (await client.get("/api/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    statuses = {"200", "400", "401", "405", "408", "413", "415", "429", "500", "503", "504"}
    for path in ("/api/embed", "/api/embed/batch", "/api/rerank"):
        responses = document["paths"][path]["post"]["responses"]
        assert set(responses) == statuses
        for status, response in responses.items():
            schema = response["content"]["application/json"]["schema"]["$ref"]
            assert schema.endswith("Answer" if status == "200" else "ErrorBody")


@pytest.mark.parametrize("path", ["/swagger-ui", "/swagger-ui/"])
async def test_swagger_page_is_local(client: Client, path: str) -> None:
    """The page loads nothing from elsewhere, and all it loads is there."""
    page = (await client.get(path)).text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(addresses) == 4
    for address in addresses:
        asset = await client.get(address)
        assert asset.status_code == 200
        kind = {"js": "javascript", "css": "text/css", "png": "image/png"}[
            address.rpartition(".")[2]
        ]
        assert kind in asset.headers["content-type"]


async def test_cors(serve: Serve) -> None:
    """Allowed origins may read answers and their headers; credentials are never allowed."""
    async with serve(cors_allowed_origins=("https://a.example",)) as client:
        answer = await client.post("/api/embed", json=BODY, headers={"Origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-queue-depth" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        answer = await client.post("/api/embed", json=BODY, headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers


async def test_reduced_precision_is_reported(serve: Serve, tmp_path: Path) -> None:
    """In 8 bits, status and model list say what that is worth; in fp32 there is nothing to say."""
    async with serve(precision="int8", warmup_ms=20, cache_dir=tmp_path) as client:
        status = (await client.get("/health/status")).json()["models"]["tiny"]
        listed = {row["id"]: row for row in (await client.get("/api/embedders")).json()}
        assert status["precision"] == "int8"
        assert status["quality"] == listed["tiny"]["quality"]
        assert 0.9 < status["quality"]["cosine"] <= 1.0
        answer = await client.post("/api/embed", json={"model": "tiny", "input": ["a", "b c"]})
        assert answer.status_code == 200
    async with serve() as client:
        assert "quality" not in (await client.get("/api/embedders")).json()[0]
