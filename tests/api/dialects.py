"""What tests of several dialects share: a request for each route, and the shapes of failures."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from embedding_server.serving.model import Model
from tests.api.test_own_kinds import PYLATE, modules, write
from tests.conftest import Client, Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import HIDDEN, write_cross_encoder, write_model
from tests.zoo import write_splade, write_states

TEXT = "the of and"


class Route(msgspec.Struct, frozen=True):
    """A route and a body that it answers; `unread`: whose failures it has before that is read."""

    dialect: str
    path: str
    body: dict[str, Any]
    runs: bool = True
    """Whether it runs a model."""
    unread: str = ""
    model: str | None = "model"
    """The field that names one."""

    def __str__(self) -> str:
        return f"{self.dialect} {self.path}"

    @property
    def early(self) -> str:
        """The dialect of failures that come before the body is read."""
        return self.unread or self.dialect


_PAIRS = {"model": "tiny", "query": TEXT, "documents": ["a", "the"]}
ROUTES = [
    *(
        Route("openai", path, {"model": "tiny", "input": TEXT})
        for path in ("/v1/embeddings", "/api/v1/embeddings", "/embeddings")
    ),
    Route("openai", "/v1/score", {"model": "tiny", "text_1": TEXT, "text_2": "a"}),
    Route("cohere", "/v1/embed", {"model": "tiny", "texts": [TEXT]}),
    Route(
        "cohere", "/v2/embed", {"model": "tiny", "texts": [TEXT], "input_type": "classification"}
    ),
    Route("cohere", "/v1/rerank", _PAIRS),
    Route("cohere", "/v2/rerank", _PAIRS),
    Route("cohere", "/v1/tokenize", {"model": "tiny", "text": TEXT}, runs=False),
    Route("cohere", "/v1/detokenize", {"model": "tiny", "tokens": [4]}, runs=False),
    Route("tei", "/embed", {"inputs": TEXT}, model=None),
    Route("tei", "/", {"inputs": TEXT}, model=None),
    Route("tei", "/rerank", {"query": TEXT, "texts": ["a", "the"]}, model=None),
    Route(
        "tei",
        "/similarity",
        {"inputs": {"source_sentence": TEXT, "sentences": ["a"]}},
        model=None,
    ),
    Route("tei", "/tokenize", {"inputs": TEXT}, runs=False, model=None),
    Route("tei", "/decode", {"ids": [4]}, runs=False, model=None),
    Route("unified", "/api/v1/embed", {"model": "tiny", "input": TEXT}),
    Route("unified", "/api/v1/rerank", _PAIRS),
    Route("fast", "/embed/batch", {"model_name": "tiny", "texts": [TEXT]}, model="model_name"),
    Route(
        "fast",
        "/embed",
        {"model_name": "tiny", "text": TEXT},
        unread="tei",
        model="model_name",
    ),
]
"""Of every dialect but the native one; for TEI's, `tiny` is the default model."""
RUNNING = [route for route in ROUTES if route.runs]


def _openai(answer: httpx.Response) -> str:
    ((key, error),) = answer.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    kinds = {True: "server_error", False: "invalid_request_error"}
    limited = answer.status_code == 429
    kind = "rate_limit_error" if limited else kinds[answer.status_code >= 500]
    assert error["type"] == kind
    return str(error["message"])


def _cohere(answer: httpx.Response) -> str:
    body = answer.json()
    assert set(body) == {"id", "message"}
    assert body["id"] == answer.headers["x-request-id"]
    return str(body["message"])


_TEI_TYPES = {422: "Validation", 424: "Backend", 429: "Overloaded", 500: "Backend"}
_TEI_TYPES |= {503: "Unhealthy", 504: "Backend"}


def _tei(answer: httpx.Response) -> str:
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == _TEI_TYPES.get(answer.status_code, "Validation")
    return str(body["error"])


def _unified(answer: httpx.Response) -> str:
    assert set(answer.json()) == {"detail"}
    return str(answer.json()["detail"])


def _fast(answer: httpx.Response) -> str:
    body = answer.json()
    assert set(body) == {"status_code", "detail", "extra"}
    assert (body["status_code"], body["extra"]) == (answer.status_code, {})
    return str(body["detail"])


def _native(answer: httpx.Response) -> str:
    assert set(answer.json()) == {"error", "code", "request_id"}
    return str(answer.json()["error"])


_MESSAGES: Mapping[str, Callable[[httpx.Response], str]] = {
    "native": _native,
    "openai": _openai,
    "cohere": _cohere,
    "tei": _tei,
    "unified": _unified,
    "fast": _fast,
}
_STATUSES: dict[str, dict[str, int]] = {
    "native": {},
    "openai": {"model": 404},
    "cohere": {"model": 404},
    "tei": {"request": 422, "model": 424, "backend": 424, "overload": 429},
    "unified": {"model": 404},
    "fast": {},
}
_USUAL = {"request": 400, "model": 400, "backend": 500, "overload": 503}


def failure(dialect: str, answer: httpx.Response, what: str | int) -> str:
    """The message of a failure, after a check of everything else in it.

    `what` is its status, or the kind of it that dialects have different ones for.
    """
    status = what if isinstance(what, int) else (_USUAL | _STATUSES[dialect])[what]
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    if what in ("overload", 503):
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert 1000 <= int(answer.headers["retry-after-ms"]) <= 60_000
    return _MESSAGES[dialect](answer)


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """The parsed answer of a request that succeeds."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refusal(client: httpx.AsyncClient, dialect: str, path: str, **body: Any) -> str:
    """The message of a wrong request's answer."""
    return failure(dialect, await client.post(path, json=body), "request")


async def native(
    client: httpx.AsyncClient, *texts: str, model: str = "tiny", **options: Any
) -> NDArray[np.float32]:
    """The native API's vectors, shape (texts, dimensions)."""
    answer = await post(client, "/api/embed", model=model, input=list(texts), **options)
    return np.array(answer["embeddings"], np.float32)


def same(rows: Any, expected: NDArray[np.float32]) -> None:
    """Vectors in JSON are these, bit by bit."""
    assert np.array_equal(np.array(rows, np.float32), expected)


async def tokens(client: httpx.AsyncClient, text: str, model: str = "tiny") -> list[int]:
    """A text's ids, without special ones."""
    found: list[int] = (await post(client, "/v1/tokenize", model=model, text=text))["tokens"]
    return found


def model_of(client: Client, name: str = "tiny") -> Model:
    """A resident model of an application."""
    model = parts_of(client).engine.registry.residents[name].model
    assert model
    return model


def write_kinds(root: Path) -> dict[str, Any]:
    """Models `tiny`, `cross`, `late` and `sparse`, and the settings that serve them."""
    root.mkdir()
    write_model(root / "tiny")
    write_cross_encoder(root / "cross")
    write_states(root / "late", "model.onnx", width=128)
    write(root / "late" / "modules.json", modules("Transformer", "Dense"))
    write(root / "late" / "1_Dense" / "config.json", {"in_features": 32, "out_features": 128})
    write(root / "late" / "config_sentence_transformers.json", PYLATE)
    write_splade(root / "sparse")
    write(root / "sparse" / "modules.json", modules("MLMTransformer", "SpladePooling"))
    write(root / "sparse" / "1_SpladePooling" / "config.json", {"pooling_strategy": "max"})
    return {
        "model_path": root,
        "allowed_embedding_models": ("tiny", "late", "sparse"),
        "allowed_rerank_models": ("tiny", "cross", "late"),
    }


@asynccontextmanager
async def blocked(serve: Serve, **settings: Any) -> AsyncIterator[tuple[Client, FakeSession]]:
    """An application whose default model `tiny` answers nobody inside the block."""
    async with serve(default_model=("tiny",), **settings) as client:
        session = FakeSession(width=HIDDEN)
        session.block()
        model_of(client).batcher.session = session
        try:
            yield client, session
        finally:
            session.release()
