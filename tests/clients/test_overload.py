"""What clients make of a server that cannot serve them now."""

import signal
import threading
import time
from collections.abc import Iterator

import cohere
import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from conftest import MODEL, Start

BUSY = {"model": MODEL, "input": ["some words to read " * 8] * 600}


@pytest.fixture
def busy(start: Start) -> Iterator[str]:
    """A server that takes one request at a time, and is busy for some seconds."""
    limits = {"INFERENCE_MAX_CONCURRENT_REQUESTS": "1", "INFERENCE_QUEUE_TIMEOUT_MS": "1"}
    with start(**limits) as (url, _):

        def fill() -> None:
            httpx.post(f"{url}/v1/embeddings", json=BUSY, timeout=60).raise_for_status()

        thread = threading.Thread(target=fill)
        thread.start()
        while httpx.get(f"{url}/health/status").json()["available_permits"] > 0:
            assert thread.is_alive()
            time.sleep(0.01)
        yield url
        thread.join()


def test_a_full_server(busy: str) -> None:
    """Overload is a 503, a 429 for TEI's clients; who comes back when told is served."""
    with pytest.raises(HfHubHTTPError) as hub:
        InferenceClient(busy).feature_extraction("x")
    assert hub.value.response.status_code == 429
    assert int(hub.value.response.headers["retry-after"]) >= 1
    with pytest.raises(cohere.ServiceUnavailableError):
        cohere.Client("any", base_url=busy, max_retries=0).embed(texts=["x"], model=MODEL)
    with openai.OpenAI(base_url=f"{busy}/v1", api_key="any", max_retries=0) as sdk:
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.embeddings.create(model=MODEL, input="x")
        assert (caught.value.status_code, caught.value.code) == (503, "service_unavailable")
        patient = sdk.with_options(max_retries=5).embeddings.with_raw_response
        answer = patient.create(model=MODEL, input="x")
        assert answer.parse().data
        assert answer.retries_taken >= 1


def test_a_server_that_ends(start: Start) -> None:
    """It refuses new work with a 503, which stays one after the SDK's own retries."""
    with start(INFERENCE_DRAIN_GRACE_MS="60000") as (url, process):
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health/ready").is_success:
            time.sleep(0.01)
        sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=1)
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.embeddings.create(model=MODEL, input="x")
        assert caught.value.status_code == 503
        assert caught.value.request.headers["x-stainless-retry-count"] == "1"
        with pytest.raises(HfHubHTTPError) as hub:
            InferenceClient(url).feature_extraction("x")
        assert hub.value.response.status_code == 503
        assert hub.value.response.json()["error_type"] == "Unhealthy"
