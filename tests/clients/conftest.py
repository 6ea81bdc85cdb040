"""Real server processes for the clients' tests; `EMBEDDING_SERVER` is the command that is tested.

The clients live in an environment without the server: nothing here may import it.
"""

import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = Path(os.environ["EMBEDDING_SERVER"])
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["What is the capital of France?", "Paris is the capital of France.", "日本語のテキスト 🦜"]
DOCUMENTS = ["Berlin is in Germany.", TEXTS[1], "I like cheese."]
LONG = "first " * 300 + "second " * 300
QUERY_PROMPT = "this is the query: "
CONFIG = f"""\
models:
  prompted: {{name: {MODEL}, prompts: {{query: "{QUERY_PROMPT}", document: ""}}}}
  cl100k: {{name: {MODEL}, token_ids: cl100k_base}}
  texts-only: {{name: {MODEL}, token_ids: refuse}}
  own/sparse: {{name: ./sparse, type: sparse-embeddings}}
  own/cross-encoder: {{name: ./cross-encoder, type: rerank}}
"""
"""Beside the demo model, which embeds and reranks under its own name."""
DEFAULTS = "prompted,own/sparse,own/cross-encoder"
"""What TEI's clients get, which name no model: of vectors, of weights, of scores."""
WRITE_MODELS = """\
import sys
from pathlib import Path
from tests.tiny import write_cross_encoder
from tests.zoo import write_splade
root = Path(sys.argv[1])
write_splade(root / "sparse")
write_cross_encoder(root / "cross-encoder")
"""

_llama_index = importlib.util.find_spec("llama_index.core")
assert _llama_index is not None
assert _llama_index.origin is not None
VOCABULARY = Path(_llama_index.origin).parent / "_static" / "tiktoken_cache"
"""cl100k_base, without a download."""

# Clients read these at import or on each call: none may reach a network or send a user's key. The
# server is offline; here HF_HUB_OFFLINE would forbid requests to our own address as well.
os.environ.update(
    TIKTOKEN_CACHE_DIR=str(VOCABULARY),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    HAYSTACK_TELEMETRY_ENABLED="False",
)
for name in ("HF_TOKEN", "HF_API_TOKEN", "CO_API_KEY", "CO_API_URL", "OPENAI_API_KEY"):
    os.environ.pop(name, None)


class Running(NamedTuple):
    """A server: its address and its process."""

    url: str
    process: "subprocess.Popen[bytes]"


class Start(Protocol):
    """Starts a server of the demo model with these settings."""

    def __call__(self, **settings: str) -> AbstractContextManager[Running]: ...


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Returns once every model serves."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if (answer := httpx.get(f"{url}/health/ready")).is_success:
                return
        time.sleep(0.05)
    raise AssertionError(f"status {process.poll()}: {answer.text}")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts servers, which share a cache; each ends by its pid."""
    cache = tmp_path_factory.mktemp("cache")

    @contextmanager
    def running(**settings: str) -> Iterator[Running]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("INFERENCE_")}
        env |= {"INFERENCE_CACHE_DIR": str(cache), "INFERENCE_WARMUP_MS": "0"}
        env |= {"HF_HUB_OFFLINE": "1", **settings}
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = [COMMAND, "serve", "--demo", "--hostname", "127.0.0.1", "--port", str(port)]
        with subprocess.Popen(command, env=env, cwd=cache, stdout=subprocess.DEVNULL) as process:
            try:
                wait_until_ready(url, process)
                yield Running(url, process)
            finally:
                process.kill()

    return running


@pytest.fixture(scope="session")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the demo model and those of `CONFIG`, without keys."""
    root = tmp_path_factory.mktemp("models")
    (root / "models.yaml").write_text(CONFIG)
    python = COMMAND.with_name("python")
    subprocess.run([python, "-c", WRITE_MODELS, root], cwd=ROOT, check=True)
    config = str(root / "models.yaml")
    with start(INFERENCE_MODEL_CONFIG=config, INFERENCE_DEFAULT_MODEL=DEFAULTS) as (url, _):
        yield url


@pytest.fixture(scope="session")
def demo(start: Start) -> Iterator[str]:
    """The address of a server as `make run` starts it."""
    with start() as (url, _):
        yield url


KEYS = ("openai", "cohere", "hub")


@pytest.fixture(scope="session")
def guarded(start: Start) -> Iterator[str]:
    """The address of a server that knows `KEYS` and answers each of them once a minute."""
    with start(INFERENCE_API_KEYS=",".join(KEYS), INFERENCE_RATE_LIMIT="1") as (url, _):
        yield url


class Native(httpx.Client):
    """The native API, which tells what the others have to say, too."""

    def vectors(self, texts: list[str] | list[list[int]], **options: object) -> np.ndarray:
        """Of the demo model, as (texts, dimensions)."""
        answer = self.post("/api/embed", json={"model": MODEL, "input": texts, **options})
        return np.array(answer.raise_for_status().json()["embeddings"], np.float32)

    def scores(self, query: str, documents: list[str], model: str = MODEL) -> list[float]:
        """Of each document, in the order that they were given."""
        body = {"model": model, "query": query, "documents": documents}
        found = self.post("/api/rerank", json=body).raise_for_status().json()["results"]
        return [one["score"] for one in sorted(found, key=lambda one: one["index"])]

    def weights(self, text: str) -> dict[int, float]:
        """Of words, by their ids, for one text."""
        body = {"model": "own/sparse", "text": text}
        answer = self.post("/api/embed/sparse", json=body).raise_for_status().json()
        (row,) = answer["embeddings"]
        return dict(zip(row["indices"], row["values"], strict=True))


@pytest.fixture(scope="session")
def native(server: str) -> Iterator[Native]:
    """The native API of `server`."""
    with Native(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def vectors(native: Native) -> np.ndarray:
    """The native API's vectors of `TEXTS`: what every client has to get."""
    return native.vectors(TEXTS)


def close(found: object, expected: object, tolerance: float = 1e-6) -> None:
    """Fails where the shapes or any numbers differ."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def sigmoid(logits: list[float]) -> np.ndarray:
    """Probabilities."""
    return 1 / (1 + np.exp(-np.array(logits)))
