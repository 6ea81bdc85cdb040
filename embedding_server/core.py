"""The vocabulary every layer shares: what is served, and what passes between the layers."""

from enum import StrEnum
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Token ids of one text, shape (tokens,), special tokens included, no padding.

Of a pair of texts, ids of the second one have `SEGMENT` added.
"""

SEGMENT = 1 << 32

Text = str | tuple[str, str]
"""What a model is run on: a text, or for cross-encoders a query and a document."""

Rows = NDArray[np.float32]
"""One vector per text, shape (texts, dimensions)."""


_TINY = np.finfo(np.float32).tiny


def normalized(rows: Rows) -> Rows:
    """Rows of length 1; a row of zeros stays as it is."""
    squares = np.vecdot(rows, rows)[:, None]
    scaled: Rows = rows / np.sqrt(np.maximum(squares, _TINY))
    return scaled


class Task(StrEnum):
    """What a client may ask of a model."""

    EMBED = "embed"
    RERANK = "rerank"


class Precision(StrEnum):
    """What a model computes in."""

    FP32 = "fp32"
    INT8 = "int8"


class Pooling(StrEnum):
    """How token states become one vector; the names sentence-transformers uses.

    `NONE`: nothing is left to pool, the graph gives what is wanted. It is a member, so that a
    table of poolings has a row for it and a spec always says one.
    """

    MEAN = "mean"
    CLS = "cls"
    LAST = "lasttoken"
    NONE = "none"


class Kind(StrEnum):
    """What a model makes of its input."""

    DENSE = "dense"
    SPARSE = "sparse"
    MULTI = "late-interaction"
    CROSS = "cross-encoder"
    IMAGE = "image"
    STATIC = "static"


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model's files are published: a repository of the hub.

    `files` are the graph or weights and what belongs to them; configuration and tokenizer files are
    fetched besides, as far as they are there. `revision` None is the newest one.
    """

    repo: str
    files: tuple[str, ...]
    revision: str | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the catalogue describes it; everything needed to load and to list it.

    `id` is the canonical name, `aliases` further names for the same weights. Its files are in the
    directory `located`, or come from `origin` when it is first loaded. `file` is the one among them
    that is loaded, mostly an exported ONNX graph; None: it is made from `model.safetensors`. `pad`
    is the id that an exported graph's rows are filled up with. `max_tokens` counts special tokens,
    0: as the files say. `dimensions` is 0 for rerankers and the size of the vocabulary for sparse
    models. `normalize`: FastEmbed's vectors have length 1; ours always have, unless a client asks
    for raw ones. `prompts` maps an input type (`query`, `document`) to the text put before it.
    `size` is what is to be downloaded, bytes, 0: not known.
    """

    id: str
    kind: Kind = Kind.DENSE
    located: Path | None = None
    origin: Origin | None = None
    pooling: Pooling
    normalize: bool = True
    max_tokens: int
    dimensions: int
    file: str | None = None
    pad: int = 0
    description: str = ""
    license: str = ""
    size: int = 0
    aliases: tuple[str, ...] = ()
    prompts: dict[str, str] = {}
    weights_sha256: str | None = None

    @property
    def directory(self) -> Path:
        """Where its files are, once that is known."""
        assert self.located
        return self.located

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a client may use."""
        return (self.id, *self.aliases)


class Encoding(msgspec.Struct, frozen=True):
    """One text as token ids; `truncated` says that it did not fit."""

    ids: Ids
    truncated: bool


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took.

    `tokens` counts real tokens without padding, `truncated` the texts that were cut;
    `fingerprint` names what computed them. It was in line for `waited` seconds, for which
    `predicted` were predicted.
    """

    fingerprint: str
    tokens: int = 0
    truncated: int = 0
    waited: float = 0.0
    predicted: float = 0.0


class Embeddings(msgspec.Struct, frozen=True):
    """The vectors of one request, in input order."""

    rows: Rows
    usage: Usage


class Ranking(msgspec.Struct, frozen=True):
    """Documents of one request, best first, ties in request order.

    `order` holds positions in the request, `scores` the raw model score of each of them.
    """

    order: list[int]
    scores: list[float]
    usage: Usage
