"""What `/metrics` shows beyond counted requests: exemplars, keys, states, bounded labels."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from embedding_server.observability.metrics import REASONS
from tests.conftest import Client, Serve, parts_of

BODY = {"model": "tiny", "input": ["the of", "and"]}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PACKAGE = Path(__file__).parents[2] / "embedding_server"


async def samples(client: httpx.AsyncClient) -> list[Sample]:
    """All samples, by the parser of OpenMetrics, which is strict."""
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = (await client.get("/metrics", headers=headers)).text
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return [sample for family in families for sample in family.samples]


async def value(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """The value of one sample."""
    found = [one for one in await samples(client) if one.name == name and one.labels == labels]
    assert len(found) == 1, (name, labels)
    return float(found[0].value)


def exemplars(found: list[Sample]) -> dict[str, str]:
    """Trace ids by the names of the histograms that have one."""
    return {
        one.name.removeprefix("inference_").removesuffix("_bucket"): one.exemplar.labels["trace_id"]
        for one in found
        if one.exemplar
    }


async def test_exemplars_name_the_trace(client: Client) -> None:
    """What a sampled trace's request took leads to the trace, from its wait to its run."""
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    assert (await client.post("/api/embed", json=BODY, headers=headers)).is_success
    rerank = {"model": "tiny", "query": "a", "documents": ["b"]}
    assert (await client.post("/api/rerank", json=rerank, headers=headers)).is_success
    names = ["embed_duration_seconds", "rerank_duration_seconds", "queue_wait_seconds"]
    names += ["run_seconds", "http_requests_duration_seconds"]
    assert exemplars(await samples(client)) == dict.fromkeys(names, TRACE)
    plain = await client.get("/metrics")
    assert "trace_id" not in plain.text


@pytest.mark.parametrize(
    "header",
    [
        "", "nonsense", f"00-{TRACE}-{SPAN}-00", f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-01\u00e9",
    ],
)  # fmt: skip
async def test_no_exemplar_without_a_sampled_trace(client: Client, header: str) -> None:
    """Nothing is kept of headers that are wrong, or of traces that nobody keeps."""
    raw = {b"traceparent": header.encode("latin-1")}
    assert (await client.post("/api/embed", json=BODY, headers=raw)).is_success
    assert exemplars(await samples(client)) == {}


async def test_exemplar_of_a_later_version(client: Client) -> None:
    """Later versions of `traceparent` may go on behind what this one has."""
    headers = {"traceparent": f"01-{TRACE}-{SPAN}-03-more"}
    assert (await client.post("/api/embed", json=BODY, headers=headers)).is_success
    assert set(exemplars(await samples(client)).values()) == {TRACE}


async def test_keys_are_counted_by_name(serve: Serve) -> None:
    """Requests and tokens are counted by the key's name; the key is nowhere."""
    async with serve(api_keys=("first", "second")) as client:
        headers = {"Authorization": "Bearer second"}
        await client.post("/api/embed", json=BODY, headers=headers)
        await client.post("/api/embed", json={"model": "nope", "text": "a"}, headers=headers)
        await client.post("/api/embed", json=BODY)
        counted = {
            (one.labels["key"], one.labels.get("status"), one.value)
            for one in await samples(client)
            if "key" in one.labels
        }
        ((name, *_), *_) = counted
        assert counted == {(name, "200", 1), (name, "400", 1), (name, None, 7)}
        assert re.fullmatch(r"key-[0-9a-f]{8}", name)


async def test_labels_are_bounded(client: Client) -> None:
    """Endpoints are templates, also where a path holds an id; methods and models are known ones."""
    for number in range(20):
        await client.get(f"/v1/models/org-{number}/model")
        await client.get(f"/api/v1/models/tiny-{number}/load")
        await client.get(f"/nowhere/{number}")
        await client.request(f"VERB{number}", "/api/embed")
        await client.post("/api/embed", json={"model": f"m{number}", "text": "a"})
        await client.post("/rerank", json={"model": f"m{number}", "query": "a", "texts": ["b"]})
    found = await samples(client)
    endpoints = {one.labels["endpoint"] for one in found if "endpoint" in one.labels}
    templates = {"/v1/models/{id}", "/api/v1/models/{id}"}
    assert endpoints == {*templates, "/api/embed", "/rerank", "unmatched"}
    assert {one.labels["method"] for one in found if "method" in one.labels} == {
        "GET", "POST", "other",
    }  # fmt: skip
    assert {one.labels["model"] for one in found if "model" in one.labels} == {
        "tiny", "other",
    }  # fmt: skip


def test_reasons_are_listed() -> None:
    """`REASONS` are the reasons that refusals in the code have."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    refused = set(re.findall(r'refusal\(\s*"(\w+)"', text))
    assert refused | {"wait_too_long", "queue_full"} == set(REASONS)
    assert all(f'"{reason}"' in text for reason in REASONS)


async def test_tasks_are_counted(client: Client) -> None:
    """A task that goes on is one more on the event loop, until it ends."""
    before = await value(client, "inference_event_loop_tasks")
    task = asyncio.create_task(asyncio.sleep(60))
    assert await value(client, "inference_event_loop_tasks") == before + 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await value(client, "inference_event_loop_tasks") == before


async def test_models_and_slots_are_shown(client: Client) -> None:
    """State, how a model really runs, what is to stay, capacity: as they are now."""
    way = {"model": "tiny", "provider": "CPUExecutionProvider", "precision": "fp32"}
    assert await value(client, "inference_model_info", **way) == 1
    assert await value(client, "inference_model_state", model="tiny", state="ready") == 1
    assert await value(client, "inference_model_state", model="tiny", state="failed") == 0
    assert await value(client, "inference_model_pinned", model="tiny") == 1
    assert await value(client, "inference_ready") == 1
    assert await value(client, "inference_draining") == 0
    assert await value(client, "inference_queue_capacity") == 1024
    assert await value(client, "inference_run_slots") == parts_of(client).device.cores
    for name in ("running_batches", "gpu_memory_tight", "certificate_expiry_timestamp_seconds"):
        assert await value(client, f"inference_{name}") == 0
    engine = parts_of(client).engine
    await engine.unload("tiny")
    assert await value(client, "inference_model_state", model="tiny", state="unloaded") == 1
    assert await value(client, "inference_model_pinned", model="tiny") == 0
    assert not [one for one in await samples(client) if one.labels == way]
    client.app.drain()
    assert await value(client, "inference_draining") == 1
    assert await value(client, "inference_ready") == 0


async def test_counters_are_there_before_the_first_event(client: Client) -> None:
    """A counter that appears with its first event hides that event from `rate`."""
    for name in (
        "model_load_failures", "run_failures", "run_retries", "run_fallbacks", "run_out_of_memory"
    ):  # fmt: skip
        assert await value(client, f"inference_{name}_total", model="other") == 0
    for reason in REASONS:
        assert await value(client, "inference_rejections_total", reason=reason) == 0


async def test_truncated_texts_are_counted(client: Client) -> None:
    """A text that was cut shows in a counter too."""
    long = "the of and " * 100
    answer = await client.post("/api/embed", json={"model": "tiny", "input": [long, "a"]})
    assert answer.headers["x-truncated-inputs"] == "1"
    assert await value(client, "inference_truncated_texts_total", model="tiny") == 1


async def test_graphs_of_ours_do_not_pad(client: Client) -> None:
    """What is computed is what there is, however different the texts of a batch are."""
    await client.post("/api/embed", json={"model": "tiny", "input": ["the of and a the", "a"]})
    real = await value(client, "inference_tokens_total", model="tiny")
    assert real == await value(client, "inference_padded_tokens_total", model="tiny") > 0
