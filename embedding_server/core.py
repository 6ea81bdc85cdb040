"""The vocabulary every layer shares: what is served, and what passes between the layers."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Token ids of one text, shape (tokens,), special tokens included, no padding.

Added to an id may be `SEGMENT`: it is of the second text of a pair; `UNSEEN`: no other token
attends to it; `SILENT`: its own state is not wanted.
"""

SEGMENT, UNSEEN, SILENT = 1 << 32, 1 << 33, 1 << 34

Item = Any
"""One input as its model's session takes it: `Ids`, a `Picture`, or what only that session knows.

Its `len` is what it counts for in batches and costs: its tokens.
"""


class Tokens(tuple[int, ...]):
    """A text as ids of its model's vocabulary, with the special tokens around it or without."""

    __slots__ = ()


Text = str | tuple[str, str] | bytes | Tokens
"""What a model is run on: a text, for cross-encoders a query and a document, or an image file."""

Side = Literal["left", "right"]
"""The end of a text too long that is cut off."""


class Query(str):
    """A text to search with, for models that treat it differently from what is searched."""

    __slots__ = ()


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A token of a text, as text-embeddings-inference's `/tokenize` describes it.

    `special` ones are put around the text; `text` is their own name. Of others it is the text's
    characters `start` up to `stop`.
    """

    id: int
    text: str
    special: bool = False
    start: int | None = None
    stop: int | None = None


class Picture(msgspec.Struct, frozen=True):
    """An image as a vision graph takes it, shape (channels, height, width).

    It counts as a token per 32 x 32 pixels: as many as ViT-B/32 has patches.
    """

    pixels: NDArray[np.float32]

    def __len__(self) -> int:
        height, width = self.pixels.shape[1:]
        return max(1, int(height * width) // 1024)


Rows = NDArray[np.float32]
"""One vector per text, shape (texts, dimensions)."""

SPARSE = np.dtype([("index", np.int64), ("value", np.float32)])

Vector = NDArray[Any]
"""What a model makes of one input: float32 of shape (dimensions,), of late interaction
(tokens, dimensions), of sparse models (entries,) of dtype `SPARSE`, by index."""

Vectors = Rows | list[Vector]
"""One `Vector` per input, in order."""


def values(vector: Vector) -> NDArray[np.float32]:
    """The numbers of a vector of any kind."""
    return vector["value"] if vector.dtype == SPARSE else vector


_TINY = np.finfo(np.float32).tiny


def normalized(vectors: Vectors) -> Rows:
    """Dense vectors as rows of length 1; one of zeros stays as it is."""
    rows = np.asarray(vectors)
    squares = np.vecdot(rows, rows)[:, None]
    scaled: Rows = rows / np.sqrt(np.maximum(squares, _TINY))
    return scaled


class Task(StrEnum):
    """What a client may ask of a model."""

    EMBED = "embed"
    RERANK = "rerank"


class Precision(StrEnum):
    """What a model computes in; on a CPU half precision is that of the weights alone.

    `TF32` is fp32 whose matrix products round what they multiply to 10 bits of mantissa, on GPUs of
    compute capability 8.0 or more; elsewhere it is fp32. Graphs are the same.
    """

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Pooling(StrEnum):
    """How token states become a text's vector; the names sentence-transformers uses.

    `TOKENS`: one vector per token stays. `SPLADE`: log(1 + relu(x)) of the largest logit of any
    token, for every word of the vocabulary (Formal et al. 2021, SPLADE v2). `NONE`: nothing is left
    to pool, the graph gives what is wanted. It is a member, so that a table of poolings has a row
    for it and a spec always says one.
    """

    MEAN = "mean"
    CLS = "cls"
    LAST = "lasttoken"
    TOKENS = "tokens"
    SPLADE = "splade"
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

    `files` are the graph or weights and what belongs to them, empty while that is not known;
    configuration and tokenizer files are fetched besides, as far as they are there. `revision` None
    is the newest one.
    """

    repo: str
    files: tuple[str, ...]
    revision: str | None = None


class Markers(msgspec.Struct, frozen=True, kw_only=True):
    """How a late-interaction model marks its texts (Khattab and Zaharia 2020, ColBERT).

    Behind the first token of a text goes `query` or `document`, a token or its id. Queries are
    filled up to `expand` tokens with `mask`, which the others attend to if `attend` says so. Tokens
    of a document that are one of the characters `skip` get no vector. `counted`: the limit in the
    model's files counts the marker. Either has a limit of its own, with the marker; 0: the model's.
    """

    query: int | str
    document: int | str
    mask: str = "[MASK]"
    expand: int = 0
    attend: bool = False
    skip: str = ""
    counted: bool = True
    query_tokens: int = 0
    document_tokens: int = 0


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is asked about a pair: prefix, `body[0]`, query, `body[1]`, document, suffix.

    Prefix and suffix stay whole where the pair is cut.
    """

    prefix: str
    body: tuple[str, str]
    suffix: str


class FastEmbedModel(msgspec.Struct, frozen=True):
    """What runs a model that is more than a graph and a pooling: FastEmbed's class `cls`."""

    cls: str
    name: str


TokenIds = Literal["model", "cl100k_base", "refuse"]
"""What ids in a request are taken for: the model's own, OpenAI's, or a mistake."""


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator says of a model against its files and the catalogue; None: nothing."""

    pooling: Pooling | None = None
    max_tokens: int | None = None
    prompts: dict[str, str] | None = None
    dimensions: int | None = None
    precision: Precision | None = None
    token_ids: TokenIds | None = None
    revision: str | None = None
    file: str | None = None

    def __bool__(self) -> bool:
        return self != Overrides()


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """A layer behind the pooling: activation(x W^T + b), as sentence-transformers' Dense.

    `path` is its directory within the model's, `inputs` and `outputs` are widths; `normalized`: x
    has length 1.
    """

    path: str
    inputs: int
    outputs: int
    bias: bool
    activation: str
    normalized: bool = False

    @property
    def weights(self) -> str:
        """Their file within the model's directory."""
        return f"{self.path}/model.safetensors"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the catalogue describes it; everything needed to load and to list it.

    `id` is the canonical name, `aliases` further names for the same weights. Its files are in the
    directory `located`, or come from `origin` when it is first loaded. `file` is the one among them
    that is loaded, mostly an exported ONNX graph; None: it is made from `model.safetensors`. `pad`
    is the id that an exported graph's rows are filled up with. `max_tokens` counts special tokens,
    0: as the files say. `dimensions` is 0 for rerankers and the size of the vocabulary for sparse
    models; `min_dimensions` are what its publisher lets vectors be cut to, 1 where nothing is said.
    `projections` follow the pooling, unless the graph has them inside. `normalize`:
    FastEmbed's vectors have length 1; ours always have, unless a client asks for raw ones.
    `prompts` maps an input type (`query`, `document`) to the text put before it. `size` is what is
    to be downloaded, bytes, 0: not known. `takes_images`: beside texts, or instead of them.
    `precision` None is what the server computes in. `overrides` are in the other fields already,
    and win over what is found in files later; where they cut `dimensions`, `uncut` is what the
    graph gives.
    """

    id: str
    kind: Kind = Kind.DENSE
    located: Path | None = None
    origin: Origin | None = None
    pooling: Pooling
    projections: tuple[Projection, ...] = ()
    normalize: bool = True
    max_tokens: int
    dimensions: int
    min_dimensions: int = 1
    file: str | None = None
    pad: int = 0
    description: str = ""
    license: str = ""
    size: int = 0
    aliases: tuple[str, ...] = ()
    prompts: dict[str, str] = {}
    markers: Markers | None = None
    template: Template | None = None
    fastembed: FastEmbedModel | None = None
    takes_images: bool = False
    weights_sha256: str | None = None
    precision: Precision | None = None
    token_ids: TokenIds = "model"  # noqa: S105 - says whose ids they are
    overrides: Overrides = Overrides()
    uncut: int = 0

    @property
    def width(self) -> int:
        """Numbers in a row of its graph."""
        return self.uncut or self.dimensions

    @property
    def directory(self) -> Path:
        """Where its files are, once that is known."""
        assert self.located
        return self.located

    @property
    def unidentified(self) -> bool:
        """Whether it stands for a repository that the hub could not be asked about yet."""
        return self.origin is not None and not self.origin.files

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a client may use."""
        return (self.id, *self.aliases)


class Encoding(msgspec.Struct, frozen=True):
    """One text as its model takes it; `truncated` says that it did not fit."""

    item: Item
    truncated: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took.

    `tokens` counts real tokens without padding, `truncated` the texts that were cut;
    `fingerprint` names what computed them. It was in line for `waited` seconds, for which
    `predicted` were predicted; then `tokenizing` and `running` seconds passed.
    """

    fingerprint: str
    tokens: int = 0
    truncated: int = 0
    waited: float = 0.0
    predicted: float = 0.0
    tokenizing: float = 0.0
    running: float = 0.0


class Embeddings(msgspec.Struct, frozen=True):
    """The vectors of one request, in input order, and how wide they are (sparse ones: 0).

    `limit` is the largest magnitude that their numbers are expected to have; 0: it is not known.
    """

    vectors: Vectors
    dimensions: int
    usage: Usage
    limit: float = 0.0


class Ranking(msgspec.Struct, frozen=True):
    """Documents of one request, best first, ties in request order.

    `order` holds positions in the request, `scores` the raw model score of each of them.
    """

    order: list[int]
    scores: list[float]
    usage: Usage
