"""Tokens as text and back, in every dialect that has them: admitted and bounded as all else."""

import asyncio

import pytest

from embedding_server.serving.schedule import Lane
from tests.api.dialects import failure
from tests.conftest import Client, Serve, parts_of

ROUTES = [
    ("tei", "/tokenize", {"inputs": "the of"}),
    ("tei", "/decode", {"ids": [5, 6]}),
    ("cohere", "/v1/tokenize", {"model": "tiny", "text": "the of"}),
    ("cohere", "/v1/detokenize", {"model": "tiny", "tokens": [5, 6]}),
]


@pytest.mark.parametrize(("dialect", "path", "body"), ROUTES)
async def test_a_full_line(serve: Serve, dialect: str, path: str, body: object) -> None:
    """Who only wants tokens waits in the same line, and is refused where it is full."""
    async with serve(
        default_model=("tiny",), max_concurrent_requests=1, max_queue_depth=0
    ) as client:
        engine = parts_of(client).engine
        model = engine.registry.residents["tiny"].model
        assert model
        with await engine.queue.permit(model.estimate(["a"]), Lane.INTERACTIVE, "somebody"):
            answer = await client.post(path, json=body)
            failure(dialect, answer, 429 if dialect == "tei" else 503)
        assert (await client.post(path, json=body)).status_code == 200
        client.app.drain()
        assert (await client.post(path, json=body)).status_code == 503


@pytest.mark.parametrize(("dialect", "path", "body"), ROUTES)
async def test_deadline(serve: Serve, dialect: str, path: str, body: object) -> None:
    """The client's own deadline holds for the wait in line."""
    async with serve(default_model=("tiny",), max_concurrent_requests=1) as client:
        engine = parts_of(client).engine
        model = engine.registry.residents["tiny"].model
        assert model
        with await engine.queue.permit(model.estimate(["a"]), Lane.INTERACTIVE, "somebody"):
            headers = {"X-Request-Timeout-Ms": "20"}
            answer = await client.post(path, json=body, headers=headers)
            failure(dialect, answer, 504)
        await asyncio.sleep(0)
        assert "inside=0" in repr(engine.queue)


async def test_size(client: Client) -> None:
    """So much that its answer would be hundreds of megabytes is refused, not begun."""
    for path, body in (
        ("/v1/tokenize", {"model": "tiny", "text": "a " * 140_000}),
        ("/v1/detokenize", {"model": "tiny", "tokens": [5] * 270_000}),
    ):
        answer = await client.post(path, json=body)
        assert "at most 262144 are allowed" in failure("cohere", answer, 400)
