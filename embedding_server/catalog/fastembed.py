"""FastEmbed's lists of models, translated into `ModelSpec`s.

Nothing is loaded or downloaded here: the lists say which file of which repository a model is, and
the class that a list belongs to says how that file's output becomes vectors.
"""

import string
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from embedding_server.core import FastEmbedModel, Kind, Markers, ModelSpec, Origin, Pooling
from embedding_server.errors import StartupError
from embedding_server.observability.logging import adopt_loguru

STATIC_TOKENS = 512
"""FastEmbed's own limit for static models, whose files say none."""
_GIGABYTE = 1_000_000_000

_CLASSES: Mapping[str, tuple[Kind, Pooling, bool]] = {
    "OnnxTextEmbedding": (Kind.DENSE, Pooling.CLS, True),
    "PooledNormalizedEmbedding": (Kind.DENSE, Pooling.MEAN, True),
    "PooledEmbedding": (Kind.DENSE, Pooling.MEAN, False),
    "LastTokenNormalizedEmbedding": (Kind.DENSE, Pooling.LAST, True),
    "JinaEmbeddingV3": (Kind.DENSE, Pooling.MEAN, True),
    "BuiltinSentenceEmbedding": (Kind.DENSE, Pooling.NONE, False),
    "CLIPOnnxEmbedding": (Kind.DENSE, Pooling.NONE, False),
    "SiglipOnnxTextEmbedding": (Kind.DENSE, Pooling.NONE, True),
    "StaticTextEmbedding": (Kind.STATIC, Pooling.NONE, True),
    "SpladePP": (Kind.SPARSE, Pooling.SPLADE, False),
    "IfSplade": (Kind.SPARSE, Pooling.NONE, False),
    "Bm25": (Kind.SPARSE, Pooling.NONE, False),
    "Bm42": (Kind.SPARSE, Pooling.NONE, False),
    "MiniCOIL": (Kind.SPARSE, Pooling.NONE, False),
    "Colbert": (Kind.MULTI, Pooling.TOKENS, True),
    "JinaColbert": (Kind.MULTI, Pooling.TOKENS, True),
    "LateOn": (Kind.MULTI, Pooling.TOKENS, True),
    "MLateOn": (Kind.MULTI, Pooling.TOKENS, True),
    "TokenEmbeddingsModel": (Kind.MULTI, Pooling.TOKENS, False),
    "ColPali": (Kind.MULTI, Pooling.NONE, False),
    "ColModernVBERT": (Kind.MULTI, Pooling.NONE, False),
    "OnnxImageEmbedding": (Kind.IMAGE, Pooling.NONE, True),
    "NormalizedEmbedding": (Kind.IMAGE, Pooling.CLS, True),
    "SiglipOnnxImageEmbedding": (Kind.IMAGE, Pooling.NONE, True),
    "OnnxTextCrossEncoder": (Kind.CROSS, Pooling.NONE, False),
}
"""Class of FastEmbed -> what it makes, how it pools, whether it normalises."""

_OBJECTS = (
    "JinaEmbeddingV3",
    "SiglipOnnxTextEmbedding",
    "StaticTextEmbedding",
    "IfSplade",
    "Bm25",
    "Bm42",
    "MiniCOIL",
    "ColPali",
    "ColModernVBERT",
)
"""Classes that are more than a graph and a pooling."""

_TAKE_IMAGES = ("ColPali", "ColModernVBERT")
_ATTENDED = ("JinaColbert",)
"""Classes whose queries attend to the masks that they are filled up with."""
_WHOLE = ("MLateOn",)
"""Classes that give punctuation vectors, too."""


def fastembed_models() -> list[ModelSpec]:
    """Every model of FastEmbed's lists, each id once.

    CLIP and SigLIP are listed under one id for both of their towers, which are different files: the
    vision tower's id is then `<id>-vision`.

    Raises:
        StartupError: a class of FastEmbed is not known here.
    """
    models: dict[str, ModelSpec] = {}
    for listing in listings():
        for spec in translate(listing):
            tower = spec.kind is Kind.IMAGE and spec.id in models
            name = f"{spec.id}-vision" if tower else spec.id
            models.setdefault(name, msgspec.structs.replace(spec, id=name))
    return list(models.values())


def translate(listing: type[Any]) -> Iterator[ModelSpec]:
    """The models of one of FastEmbed's classes.

    Raises:
        StartupError: the class is not known here.
    """
    # FastEmbed's public lists do not say which class a model belongs to.
    for model in listing._list_supported_models():  # noqa: SLF001
        if listing.__name__ not in _CLASSES:
            raise StartupError(f"FastEmbed's class {listing.__name__} ({model.model}) is not known")
        name = listing.__name__
        kind, pooling, normalize = _CLASSES[name]
        yield ModelSpec(
            id=model.model,
            kind=kind,
            origin=Origin(repo=model.sources.hf, files=(model.model_file, *model.additional_files)),
            file=model.model_file,
            pooling=pooling,
            normalize=normalize,
            max_tokens=STATIC_TOKENS if kind is Kind.STATIC else 0,
            dimensions=getattr(model, "dim", 0) or getattr(model, "vocab_size", 0),
            description=model.description,
            license=model.license,
            size=round(model.size_in_GB * _GIGABYTE),
            markers=_markers(listing),
            fastembed=FastEmbedModel(name, model.model) if name in _OBJECTS else None,
            takes_images=kind is Kind.IMAGE or name in _TAKE_IMAGES,
        )


def _markers(listing: type[Any]) -> Markers | None:
    """What a class of the ColBERT family says about its texts."""
    if not hasattr(listing, "MIN_QUERY_LENGTH"):
        return None
    name, short = listing.__name__, listing.MIN_QUERY_LENGTH
    return Markers(
        query=listing.QUERY_MARKER_TOKEN_ID,
        document=listing.DOCUMENT_MARKER_TOKEN_ID,
        mask=listing.MASK_TOKEN,
        expand=short + 1 if short else 0,  # there it does not count the marker
        attend=name in _ATTENDED,
        skip="" if name in _WHOLE else string.punctuation,
        counted=bool(listing.RESERVED_MARKER_TOKENS),
    )


def listings() -> tuple[type[Any], ...]:
    """Every class that has a list; text before images."""
    # Here, because importing FastEmbed takes 0.4 s, and a server of own models needs none of it.
    from fastembed import (  # noqa: PLC0415
        ImageEmbedding,
        LateInteractionMultimodalEmbedding,
        LateInteractionTextEmbedding,
        SparseTextEmbedding,
        TextEmbedding,
    )
    from fastembed.late_interaction.token_embeddings import TokenEmbeddingsModel  # noqa: PLC0415
    from fastembed.rerank.cross_encoder import TextCrossEncoder  # noqa: PLC0415

    adopt_loguru()
    return (
        *TextEmbedding.EMBEDDINGS_REGISTRY,
        *SparseTextEmbedding.EMBEDDINGS_REGISTRY,
        *LateInteractionTextEmbedding.EMBEDDINGS_REGISTRY,
        TokenEmbeddingsModel,
        *LateInteractionMultimodalEmbedding.EMBEDDINGS_REGISTRY,
        *ImageEmbedding.EMBEDDINGS_REGISTRY,
        *TextCrossEncoder.CROSS_ENCODER_REGISTRY,
    )
