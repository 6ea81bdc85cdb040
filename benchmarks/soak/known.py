"""What every text's vector is, asked one by one of a quiet server, and how far an answer is off.

Differences are the largest of any number, infinite where the form of an answer is wrong.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.corpus import corpus
from benchmarks.server import demo_server
from benchmarks.soak.models import CROSS, DEMO, DENSE, MULTI, SPARSE

Rows = NDArray[np.float32]
Words = Mapping[int, float]
"""Weights by the number of a word."""

TOLERANCE = 1e-4
"""Batches differ in the last bits; texts differ by far more (`Known.closest`)."""
QUERIES = 4
_CORPUS = 100
_ODD = ("", "x", "\N{CAT FACE} \N{DOG FACE}", "\u732b\u304c\u597d\u304d", "many words " * 3000)


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """Texts, and what each model makes of them; the first `QUERIES` are queries, too."""

    texts: Sequence[str]
    dense: Mapping[str, Rows]
    multi: Sequence[Rows]
    sparse: Sequence[Words]
    scores: Mapping[str, Rows]
    """Model -> (queries, texts)."""

    @property
    def closest(self) -> float:
        """The least difference between the vectors of two texts, of any model."""
        return min(
            rows_off(rows[one], rows[other])
            for rows in self.dense.values()
            for one in range(len(rows))
            for other in range(one)
        )


def ask_known(flags: Sequence[str], directory: Path) -> Known:
    """Ask a server of its own, which has all models loaded and one request at a time."""
    texts = [*corpus(_CORPUS), *_ODD]
    with (
        demo_server(*flags, "--cache-dir", str(directory)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        ask = partial(_ask, client)
        dense = {
            model: np.array([_embedding(ask, model, text) for text in texts], np.float32)
            for model in DENSE
        }
        sparse = [
            words(ask("/api/embed/sparse", model=SPARSE, text=one)["embeddings"][0])
            for one in texts
        ]
        cross = [
            [
                ask("/api/rerank", model=CROSS, query=query, documents=[text])["results"][0][
                    "score"
                ]
                for text in texts
            ]
            for query in texts[:QUERIES]
        ]
        return Known(
            texts=texts,
            dense=dense,
            multi=[_embedding(ask, MULTI, one, output="tokens") for one in texts],
            sparse=sparse,
            scores={
                CROSS: np.array(cross, np.float32),
                DEMO: dense[DEMO][:QUERIES] @ dense[DEMO].T,
            },
        )


def rows_off(found: object, known: Rows) -> float:
    """Of vectors, or a vector."""
    try:
        rows = np.asarray(found, np.float32)
    except ValueError:
        return math.inf
    return float(np.abs(rows - known).max(initial=0)) if rows.shape == known.shape else math.inf


def words_off(found: Words, known: Words) -> float:
    """Of a sparse vector; a word that one of them lacks has weight 0 there."""
    words = found.keys() | known.keys()
    return max((abs(found.get(word, 0.0) - known.get(word, 0.0)) for word in words), default=0.0)


def ranking_off(ranked: Sequence[tuple[int, float]], known: Rows, top: int) -> float:
    """Of scores by position, of which the `top` best were wanted, best first."""
    places = [place for place, _ in ranked]
    if len(set(places)) != len(places) or len(places) != min(top, len(known)):
        return math.inf
    if not set(places) <= set(range(len(known))):
        return math.inf
    right = known[places]
    differences = [abs(score - known[place]) for place, score in ranked]
    disorder = np.diff(right).max(initial=0)
    left_out = np.delete(known, places).max(initial=-np.inf) - right.min(initial=np.inf)
    return float(max(*differences, disorder, left_out, 0.0))


def words(answer: Mapping[str, Any]) -> Words:
    """A sparse vector as the native API writes it."""
    return dict(zip(answer["indices"], answer["values"], strict=True))


def unpacked(text: str) -> Rows:
    """A vector in base64."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def _ask(client: httpx.Client, path: str, **body: object) -> Any:
    answer = client.post(path, json=body)
    answer.raise_for_status()
    return answer.json()


def _embedding(ask: Any, model: str, text: str, **how: object) -> Rows:
    return np.array(ask("/api/embed", model=model, text=text, **how)["embeddings"][0], np.float32)
