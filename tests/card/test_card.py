"""What a card's memory and faults do to those who are served."""

import operator
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.card.conftest import CARD, INJECTED, Serve
from tests.card.models import NUMBER
from tests.process import Server

_MANY = ["the of that was " * 6] * 64
_ROUNDS, _SETTLED = 2000, 100
_SECONDS = 30.0
_LARGEST = 'le="4096.0"'
"""Tokens of the largest batch that ran before anybody asked: `serving/memory.py`."""
_MIB = 1 << 20


def embed(server: Server, texts: list[str]) -> httpx.Response:
    """Raw vectors of texts."""
    body = {"model": "embedder", "input": texts, "normalize": False}
    return server.post("/api/embed", json=body)


def rerank(server: Server) -> httpx.Response:
    """Scores of two documents."""
    body = {"model": "scorer", "query": "the", "documents": ["of", "that"]}
    return server.post("/api/rerank", json=body)


def metric(server: Server, name: str, label: str = "") -> float:
    """A metric's value, summed over its labels, or over those with this one."""
    lines = server.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.split()[-1]) for line in found if label in line)


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until it holds: the card is looked at twice a second."""
    deadline = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def full() -> Iterator[Callable[[], None]]:
    """Another process has all memory of the card that nobody had; what is yielded ends it."""
    command, pipe = [sys.executable, str(INJECTED / "sitecustomize.py")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "full\n"

        def end() -> None:
            assert process.stdin
            process.stdin.close()
            process.wait()

        yield end
        end()


def broken(server: Server) -> httpx.Response:
    """The first answer that is no success after the card breaks, which takes a moment."""
    server.process.send_signal(signal.SIGUSR1)
    while (answer := embed(server, ["the"])).is_success:
        pass
    return answer


def test_it_serves(serve: Serve) -> None:
    """Vectors and scores come from the card, in half precision."""
    with serve() as server:
        (vector, *_) = embed(server, _MANY).json()["embeddings"]
        assert vector == pytest.approx([NUMBER] * len(vector), rel=1e-3)
        scores = [one["score"] for one in rerank(server).json()["results"]]
        assert scores == pytest.approx([NUMBER] * 2, rel=1e-2)
        for state in server.get("/health/status").json()["models"].values():
            assert (state["provider"], state["precision"]) == ("CUDAExecutionProvider", "fp16")


def test_a_full_card(serve: Serve) -> None:
    """What ran before runs again in as many batches, and more than ever before in smaller ones."""
    with serve() as server:

        def batches(requests: int) -> float:
            before = metric(server, "inference_batch_tokens_count")
            with ThreadPoolExecutor(requests) as pool:
                answers = list(pool.map(lambda _: embed(server, _MANY), range(requests)))
            assert {answer.status_code for answer in answers} == {200}
            return metric(server, "inference_batch_tokens_count") - before

        alone = batches(1)
        with full():
            eventually(lambda: metric(server, "inference_gpu_memory_tight") == 1)
            assert batches(1) == alone
            batches(32)
            small = metric(server, "inference_batch_tokens_bucket", _LARGEST)
            assert small == metric(server, "inference_batch_tokens_count")
        eventually(lambda: metric(server, "inference_gpu_memory_tight") == 0)
        assert metric(server, "inference_run_out_of_memory_total") == 0


def test_a_card_that_fills_up(serve: Serve) -> None:
    """Who comes before that is seen does not notice either."""
    with serve() as server, full(), ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: embed(server, _MANY), range(64)))
        assert {answer.status_code for answer in answers} == {200}


def test_memory_runs_out(serve: Serve) -> None:
    """Batches become smaller until they fit into the arena, and nobody notices."""
    with serve("--cuda-arena-size", "8M") as server, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: embed(server, _MANY), range(32)))
        assert {answer.status_code for answer in answers} == {200}
        assert metric(server, "inference_run_out_of_memory_total") > 0


def test_a_model_that_does_not_fit(serve: Serve) -> None:
    """It is loaded as soon as there is room; until then its clients are told to come back."""
    with full() as end, serve(ready=False) as server:
        eventually(lambda: "Failed to allocate" in server.get("/health/ready").text)
        answer = embed(server, ["the"])
        assert (answer.status_code, answer.json()["code"]) == (503, "MODEL_LOAD_ERROR")
        assert "retry-after" in answer.headers
        end()
        server.until("/health/ready", _SECONDS)
        assert embed(server, ["the"]).is_success


def test_unloading_gives_memory_back(serve: Serve, card: str) -> None:
    """All that the models took; CUDA itself keeps some of a real card."""
    with serve() as server:
        assert embed(server, _MANY).is_success

        def used() -> float:
            return metric(server, "gpu_memory_used_bytes")

        eventually(lambda: used() > 0)
        before = used()
        for name in ("embedder", "scorer"):
            assert server.post(f"/api/v1/models/{name}/unload").is_success
        eventually(lambda: used() == 0 if card == "nothing" else used() < before - _MIB)


def test_alternating_models(serve: Serve) -> None:
    """An embedder and a cross-encoder in turn, and memory stays what it was."""
    with serve("--log-level", "error") as server:  # what nobody reads would fill a pipe
        for number in range(_ROUNDS):
            assert embed(server, ["the of that"] * 4).is_success
            assert rerank(server).is_success
            if number == _SETTLED:
                time.sleep(1)
                settled = metric(server, "gpu_memory_used_bytes")
        time.sleep(1)
        assert metric(server, "gpu_memory_used_bytes") < settled + _MIB


def test_a_card_that_breaks(serve: Serve) -> None:
    """Its clients are told to go elsewhere, and the process ends so that another one is started."""
    with serve() as server:
        assert embed(server, ["the"]).is_success
        answer = broken(server)
        assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert "retry-after" in answer.headers
        log, _ = server.process.communicate(timeout=_SECONDS)
        assert server.process.returncode == 1
        assert "CUDA failure 719" in log
        assert "server.stopped" in log


def test_no_cuda_graphs_where_vectors_are_reproducible(serve: Serve) -> None:
    """Which sizes have one is measured anew at every load."""
    with serve("--cuda-graphs", "true", "--reproducible", "true") as server:
        assert embed(server, ["the"]).is_success
        server.process.terminate()
        log, _ = server.process.communicate(timeout=_SECONDS)
        assert "graphs.chosen" not in log


@pytest.mark.parametrize("cards", [2], indirect=True)
def test_two_cards(serve: Serve) -> None:
    """Both hold the models, which is seen, and run batches."""

    def kernels() -> list[int]:
        state = Path(os.environ["CARDS"]).read_bytes()
        return [launched for _, _, launched in struct.iter_unpack(CARD, state)]

    def held(number: int) -> float:
        return metric(server, "gpu_memory_used_bytes", f'device="{number}"')

    with serve() as server, ThreadPoolExecutor(8) as pool:
        eventually(lambda: held(0) > 0 < held(1))
        before = kernels()
        answers = list(pool.map(lambda _: embed(server, _MANY), range(32)))
        assert {answer.status_code for answer in answers} == {200}
        assert all(map(operator.gt, kernels(), before))


@pytest.mark.usefixtures("card")
def test_cuda_graphs(card_models: Path) -> None:
    """They are captured while others run, are not broken by it, and nothing is left of them.

    On a real card they give what plain runs give, too.
    """
    command = [sys.executable, "-m", "tests.card.captures", str(card_models / "embedder")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_server_with_cuda_graphs(
    serve: Serve, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves small batches by them, where kernels take long to launch, until the card breaks."""
    monkeypatch.setenv("CARD_LAUNCH", "50")
    with serve("--cuda-graphs", "true") as server:
        (vector,) = embed(server, ["the"]).json()["embeddings"]
        assert vector == pytest.approx([NUMBER] * len(vector), rel=1e-3)
        assert len(embed(server, _MANY).json()["embeddings"]) == len(_MANY)
        assert broken(server).status_code == 503
        log, _ = server.process.communicate(timeout=_SECONDS)
        assert server.process.returncode == 1
        which = '"tokens":[16,32],' if card == "nothing" else ""
        assert log.count(f'{which}"event":"graphs.chosen"') >= 2
        assert "graphs.not_captured" not in log
        assert "graphs.differ" not in log
