"""Requests that must be answered right, in every dialect, and others that must be refused."""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np

from benchmarks.soak.known import (
    QUERIES,
    Known,
    ranking_off,
    rows_off,
    unpacked,
    words,
    words_off,
)
from benchmarks.soak.models import CROSS, DEMO, DENSE, EXPORTED, MULTI, SPARSE

_MOST, _MOST_BY_TOKEN = 64, 4
"""Texts per request."""


class Ask(msgspec.Struct, frozen=True):
    """A request, and how far its answer's body is from what is right."""

    path: str
    body: Mapping[str, Any]
    off: Callable[[Any], float]


class Draw(msgspec.Struct, frozen=True):
    """What a request is made of, by chance."""

    known: Known
    chance: random.Random
    model: str

    def places(self, most: int = _MOST) -> list[int]:
        """Of texts: a few mostly, rarely many."""
        count = min(most, int(2 ** self.chance.uniform(0, 6.01)))
        return self.chance.sample(range(len(self.known.texts)), count)

    def texts(self, places: list[int]) -> list[str]:
        """The texts there."""
        return [self.known.texts[at] for at in places]


class Kind(msgspec.Struct, frozen=True):
    """A kind of request, and the models it may be asked of."""

    models: tuple[str, ...]
    make: Callable[[Draw], Ask]


def _vectors(
    path: str, field: str, read: Callable[[Any], Any], draw: Draw, **further: object
) -> Ask:
    places = draw.places()
    body = {"model": draw.model, field: draw.texts(places), **further}
    right = draw.known.dense[draw.model][places]
    return Ask(path, body, lambda answer: rows_off(read(answer), right))


def _embeddings(answer: Any) -> Any:
    return answer["embeddings"]


def _native_base64(answer: Any) -> Any:
    return [unpacked(one) for one in answer["embeddings"]]


def _openai(answer: Any) -> Any:
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


def _openai_base64(answer: Any) -> Any:
    return [unpacked(one) for one in _openai(answer)]


def _cohere(answer: Any) -> Any:
    return answer["embeddings"]["float"]


def _shortened(draw: Draw) -> Ask:
    places = draw.places()
    cut = draw.known.dense[draw.model][places][:, :32]
    right = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    body = {"model": draw.model, "texts": draw.texts(places), "dimensions": 32}
    return Ask("/api/embed/batch", body, lambda answer: rows_off(answer["embeddings"], right))


def _sparse(draw: Draw) -> Ask:
    places = draw.places()

    def off(answer: Any) -> float:
        found = [words(one) for one in answer["embeddings"]]
        right = [draw.known.sparse[at] for at in places]
        return max(map(words_off, found, right)) if len(found) == len(right) else np.inf

    body = {"model": draw.model, "input": draw.texts(places)}
    return Ask("/api/embed/sparse", body, off)


def _tokens(draw: Draw) -> Ask:
    places = draw.places(_MOST_BY_TOKEN)

    def off(answer: Any) -> float:
        found, right = answer["embeddings"], [draw.known.multi[at] for at in places]
        return max(map(rows_off, found, right)) if len(found) == len(right) else np.inf

    body = {"model": draw.model, "input": draw.texts(places), "output": "tokens"}
    return Ask("/api/embed", body, off)


def _ranking(
    path: str,
    documents: str,
    top: str,
    read: Callable[[Any], Any],
    draw: Draw,
    *,
    score: str = "score",
    **further: object,
) -> Ask:
    places, query = draw.places(), draw.chance.randrange(QUERIES)
    body = {"model": draw.model, "query": draw.known.texts[query], **further}
    body |= {documents: draw.texts(places)}
    count = len(places)
    if top and draw.chance.random() < 0.5:
        body[top] = count = draw.chance.randint(1, count)
    right = draw.known.scores[draw.model][query][places]

    def off(answer: Any) -> float:
        ranked = [(one["index"], one[score]) for one in read(answer)]
        return ranking_off(ranked, right, count)

    return Ask(path, body, off)


def _results(answer: Any) -> Any:
    return answer["results"]


def _itself(answer: Any) -> Any:
    return answer


KINDS: Mapping[str, Kind] = {
    "native": Kind(DENSE, partial(_vectors, "/api/embed", "input", _embeddings)),
    "native, base64": Kind(
        DENSE, partial(_vectors, "/api/embed", "input", _native_base64, encoding_format="base64")
    ),
    "native, 32 dimensions": Kind(DENSE, _shortened),
    "native, sparse": Kind((SPARSE,), _sparse),
    "native, tokens": Kind((MULTI,), _tokens),
    "native, rerank": Kind(
        (CROSS, DEMO), partial(_ranking, "/api/rerank", "documents", "top_k", _results)
    ),
    "openai": Kind(DENSE, partial(_vectors, "/v1/embeddings", "input", _openai)),
    "openai, base64": Kind(
        DENSE,
        partial(_vectors, "/v1/embeddings", "input", _openai_base64, encoding_format="base64"),
    ),
    "cohere": Kind(
        DENSE,
        partial(
            _vectors,
            "/v2/embed",
            "texts",
            _cohere,
            input_type="search_document",
            embedding_types=["float"],
        ),
    ),
    "cohere, rerank": Kind(
        (DEMO,),
        partial(_ranking, "/v2/rerank", "documents", "top_n", _results, score="relevance_score"),
    ),
    "tei": Kind((EXPORTED,), partial(_vectors, "/embed", "inputs", _itself)),
    "tei, rerank": Kind(
        (CROSS,),
        partial(_ranking, "/rerank", "texts", "", _itself, raw_scores=True),
    ),
    "unified": Kind(DENSE, partial(_vectors, "/api/v1/embed", "input", _itself)),
}
"""Name -> a kind of request whose answer is known."""

DEFAULTS = (EXPORTED, CROSS)
"""Models of requests that name none."""


class Wrong(msgspec.Struct, frozen=True):
    """A request that must be refused so."""

    path: str
    body: bytes
    status: int
    headers: Mapping[str, str] = {}


_TEXT = b'{"model": "%s", "text": "one"}' % DEMO.encode()
WRONG: Mapping[str, Wrong] = {
    "half a body": Wrong("/api/embed", _TEXT[:20], 400),
    "no UTF-8": Wrong("/api/embed", b'{"model": "\xff"}', 400),
    "too deep": Wrong("/v1/embeddings", b'{"input": ' + b"[" * 5000, 400),
    "wrong shape": Wrong("/api/rerank", b'{"model": 1}', 400),
    "too many texts": Wrong(
        "/api/embed", b'{"model": "%s", "input": [%s"x"]}' % (DEMO.encode(), b'"x",' * 500), 400
    ),
    "unknown model": Wrong("/api/embed", b'{"model": "gpt-5", "text": "one"}', 400),
    "openai, unknown model": Wrong("/v1/embeddings", b'{"model": "gpt-5", "input": "one"}', 404),
    "model of another task": Wrong(
        "/api/embed", b'{"model": "%s", "text": "one"}' % CROSS.encode(), 400
    ),
    "tei, wrong shape": Wrong("/rerank", b'{"query": "one"}', 422),
    "no such path": Wrong("/api/nothing", _TEXT, 404),
    "no JSON": Wrong("/api/embed", _TEXT, 415, {"content-type": "text/plain"}),
    "no gzip": Wrong("/api/embed", _TEXT, 400, {"content-encoding": "gzip"}),
    "unknown encoding": Wrong("/api/embed", _TEXT, 415, {"content-encoding": "br"}),
    "over the limit": Wrong("/api/embed", b" " * (2 << 20), 413),
    "wrong key": Wrong("/api/embed", _TEXT, 401, {"authorization": "Bearer wrong"}),
}
"""Name -> what must be refused."""

PROBES = ("/health", "/health/live", "/health/ready", "/health/status", "/metrics", "/v1/models")
"""Must answer 200 at any time."""
