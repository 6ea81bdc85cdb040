"""What differs between kinds of models: how inputs are encoded and laid out, how vectors end up.

A new kind of model is a member of `Kind` and a row in the tables here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from embedding_server.core import (
    Kind,
    ModelSpec,
    Query,
    Rows,
    Text,
    Vector,
    Vectors,
    normalized,
)
from embedding_server.runtime.encoder import Encoder
from embedding_server.runtime.layout import Layout, LayoutError, Packed, Padded, Pixels, Value
from embedding_server.runtime.markers import MarkingTokenizer
from embedding_server.runtime.session import LayoutOf
from embedding_server.runtime.template import TemplateTokenizer
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.texts import CALIBRATION

_TEXTS = ("a", "The model answers before anybody asks.", Query("Who answers before anybody asks?"))
_EMPTY = ("", *_TEXTS)
_PAIRS = [(str(_TEXTS[-1]), text) for text in _EMPTY]
_CALIBRATING = CALIBRATION[:37]
"""From nothing at all, which gave the largest numbers, to sentences in many languages."""


def probes(spec: ModelSpec) -> list[Text]:
    """A few inputs of the model's kind, to prove it with."""
    if spec.kind is Kind.CROSS:
        return list(_PAIRS)
    texts: list[Text] = []
    if spec.kind is not Kind.IMAGE:
        # Nothing is left of an empty text where single words are counted.
        texts += _TEXTS if spec.kind in (Kind.SPARSE, Kind.STATIC) else _EMPTY
    return texts + (_sample_images() if spec.takes_images else [])


def calibrating(spec: ModelSpec) -> list[Text]:
    """Inputs whose vectors tell how large a model's numbers get; none where rows are no vectors.

    Texts are some 800 tokens together.
    """
    if spec.kind is Kind.IMAGE:
        return _sample_images()
    return list(_CALIBRATING) if spec.kind in (Kind.DENSE, Kind.STATIC) else []


def encoder_of(spec: ModelSpec, max_pixels: int) -> Encoder:
    """What encodes the model's inputs; images may have so many pixels.

    Raises:
        TokenizerError, ModelFilesError: a file is missing, or says what is not known.
    """
    path = spec.directory / "tokenizer.json"
    if spec.takes_images or spec.fastembed:
        return _library_encoder(spec, max_pixels)
    if spec.template:
        return TemplateTokenizer(path, spec.max_tokens, spec.template)
    if spec.markers:
        return MarkingTokenizer(path, spec.max_tokens, spec.markers)
    return Tokenizer(path, spec.max_tokens)


def layout_of(spec: ModelSpec, encoder: Encoder) -> LayoutOf:
    """How an exported graph of the model takes its inputs."""
    if spec.kind is Kind.IMAGE:
        return partial(Pixels, pooling=spec.pooling, like=encoder.encode(_sample_images())[0].item)
    return partial(_of_texts, spec=spec)


def _of_texts(inputs: Sequence[Value], outputs: Sequence[Value], spec: ModelSpec) -> Layout:
    """That of others' graphs, or of one that `embedding-server convert --out` left."""
    chosen = spec.overrides.pooling is not None
    if not any(one.name == "lengths" for one in inputs):
        return Padded(inputs, outputs, pooling=spec.pooling, pad=spec.pad, pooled_here=chosen)
    if chosen:
        raise LayoutError(
            "the graph was made for one pooling, INFERENCE_MODEL_CONFIG wants another"
        )
    return Packed(inputs, pooling=spec.pooling)


def finished(
    kind: Kind, vectors: Sequence[Vector], *, dimensions: int | None, normalize: bool
) -> Vectors:
    """Raw vectors as clients want them: cut to so many dimensions, then of length 1.

    Sparse ones are left as they are.
    """
    if kind is Kind.SPARSE or not vectors:
        return list(vectors)
    if kind is Kind.MULTI:
        return [_cut(one, dimensions, normalize=normalize) for one in vectors]
    return _cut(np.stack(vectors), dimensions, normalize=normalize)


def scores(kind: Kind, vectors: Sequence[Vector], queries: int = 1) -> Rows:
    """Of documents, by what a reranking model makes of them; shape (documents,).

    A cross-encoder gives a score for each, others a vector for the query, or for one query per
    document, and then for each document.
    """
    if not vectors:
        return np.empty(0, np.float32)
    if kind is Kind.CROSS or queries == 1:
        return _SCORES[kind](vectors)
    pairs = zip(vectors[:queries], vectors[queries:], strict=True)
    return np.concatenate([_SCORES[kind](pair) for pair in pairs])


def relevance(kind: Kind, raw: Rows) -> Rows:
    """Scores between 0 and 1 where the model gives logits; others are left as they are."""
    if kind is not Kind.CROSS:
        return raw
    return np.asarray((1 + np.tanh(raw / 2)) / 2, np.float32)  # 1 / (1 + exp(-raw)), in any range


def _cut(rows: Rows, dimensions: int | None, *, normalize: bool) -> Rows:
    rows = rows[:, :dimensions]
    return normalized(rows) if normalize else np.ascontiguousarray(rows)


def _logits(vectors: Sequence[Vector]) -> Rows:
    return np.concatenate(vectors)


def _cosines(vectors: Sequence[Vector]) -> Rows:
    rows = normalized(list(vectors))
    cosines: Rows = rows[1:] @ rows[0]
    return cosines


def _max_sims(vectors: Sequence[Vector]) -> Rows:
    """The sum, over tokens of the query, of the best cosine with any of the document's."""
    query, *documents = map(normalized, vectors)
    best = [(query @ one.T).max(axis=1, initial=-1.0).sum() for one in documents]
    return np.array(best, np.float32)


_SCORES: Mapping[Kind, Callable[[Sequence[Vector]], Rows]] = {
    Kind.CROSS: _logits,
    Kind.DENSE: _cosines,
    Kind.STATIC: _cosines,
    Kind.MULTI: _max_sims,
}


def _sample_images() -> list[Text]:
    from embedding_server.catalog.images import sample_images  # noqa: PLC0415 - as below

    return list(sample_images())


def _library_encoder(spec: ModelSpec, max_pixels: int) -> Encoder:
    # Here, because its libraries take half a second, and most servers need none of them.
    from embedding_server.catalog.images import ImageEncoder, preparation  # noqa: PLC0415
    from embedding_server.catalog.objects import ObjectEncoder  # noqa: PLC0415

    if not spec.fastembed:
        return ImageEncoder(preparation(spec.directory), max_pixels)
    tokenizer = None
    if spec.max_tokens:
        tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    return ObjectEncoder(spec.fastembed.cls, tokenizer, max_pixels)
