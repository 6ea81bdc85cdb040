"""Models that are more than a graph and a pooling: FastEmbed's own objects, as sessions.

They take texts and images rather than token ids: their counting of words, their expansions and
their tasks are theirs. Admission, lines and batches are the same as for all other models.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedding_server.catalog.fastembed import listings
from embedding_server.catalog.images import open_image
from embedding_server.core import (
    SPARSE,
    Encoding,
    ModelSpec,
    Precision,
    Query,
    Side,
    Text,
    Tokens,
    Vector,
    Vectors,
)
from embedding_server.observability.logging import described
from embedding_server.runtime.encoder import NO_IDS, InputError
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.providers import CPU
from embedding_server.runtime.session import Stop, Threads
from embedding_server.runtime.tokenizer import MOST_CHARS_PER_TOKEN, Tokenizer

_IMAGE_TOKENS = 1024
"""What an image counts for: ColPali makes so many patches of it."""


class Passage(msgspec.Struct, frozen=True):
    """A text or an image on its way to an object; it counts for so many tokens."""

    content: str | bytes
    method: str
    tokens: int

    def __len__(self) -> int:
        return self.tokens


class _Methods(msgspec.Struct, frozen=True):
    """What an object calls embedding."""

    document: str = "embed"
    query: str = "query_embed"
    image: str = ""


_METHODS: Mapping[str, _Methods] = {
    "ColPali": _Methods("embed_text", "embed_text", "embed_image"),
    "ColModernVBERT": _Methods("embed_text", "embed_text", "embed_image"),
}
_UNLIMITED = 1_000_000
_THREADLESS = ("Bm25", "StaticTextEmbedding")
"""Classes without a graph."""


class ObjectEncoder:
    """An `Encoder` that leaves texts as they are, cut and counted.

    Args:
        cls: FastEmbed's class.
        tokenizer: counts and cuts; None: nothing is cut, and words are counted.
        max_pixels: width times height of the largest image.
    """

    quick_chars = 0
    specials = 0

    def __init__(self, cls: str, tokenizer: Tokenizer | None, max_pixels: int) -> None:
        self._methods = _methods(cls)
        self.tokenizer = tokenizer
        self._max_pixels = max_pixels
        self.max_tokens = tokenizer.max_tokens if tokenizer else _UNLIMITED
        if self._methods.image:
            self.max_tokens = max(self.max_tokens, _IMAGE_TOKENS)

    def encode(self, texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        """See `Encoder`."""
        return [self._encode(index, text, side) for index, text in enumerate(texts)]

    def _encode(self, index: int, text: Text, side: Side) -> Encoding:
        if isinstance(text, bytes):
            # It is unpacked again when its turn has come: a request of many would fill the memory.
            open_image(index, text, self._max_pixels)
            return Encoding(Passage(text, self._methods.image, _IMAGE_TOKENS))
        if isinstance(text, Tokens):
            text = self._decoded(index, text)
        assert isinstance(text, str)
        method = self._methods.query if isinstance(text, Query) else self._methods.document
        if not self.tokenizer:
            return Encoding(Passage(str(text), method, 1 + len(text.split())))
        (counted,) = self.tokenizer.encode([text])
        if counted.truncated and side == "left":
            # FastEmbed cuts once more, at the right.
            limit = self.tokenizer.max_tokens
            raise InputError(
                index, f"has more than {limit} tokens, its truncation_direction must be right"
            )
        cut = text[: self.tokenizer.max_tokens * MOST_CHARS_PER_TOKEN]
        return Encoding(Passage(cut, method, len(counted.item)), counted.truncated)

    def _decoded(self, index: int, tokens: Tokens) -> str:
        if not self.tokenizer:
            raise InputError(index, NO_IDS)
        try:
            return self.tokenizer.decode([tokens], skip_specials=True)[0]
        except InputError as exc:
            raise InputError(index, str(exc)) from exc


class ObjectSession:
    """One of FastEmbed's objects as a `Session`; it cannot be stopped.

    Args:
        spec: names its class, and where its files are.
        threads: of a run.

    Raises:
        SessionError: its files are missing or damaged.
    """

    provider = CPU
    precision = Precision.FP32
    has_wide = False
    costs_above = 0

    def __init__(self, spec: ModelSpec, threads: Threads) -> None:
        assert spec.fastembed
        cls = spec.fastembed.cls
        self.threads = threads
        self.padded = cls not in _THREADLESS
        self.resident_bytes = _size(spec.directory, spec.file)
        options: dict[str, Any] = {}
        if cls not in _THREADLESS:
            options = {"threads": threads.per_run, "providers": [CPU]}
        directory = str(spec.directory)
        try:
            self._object: Any = _class(cls)(
                spec.fastembed.name, directory, specific_model_path=directory, **options
            )
        except Exception as exc:  # its constructors raise what their libraries raise
            raise SessionError(f"{spec.directory}: {exc}") from exc
        methods = _methods(cls)
        self._sample = methods.document
        # Those that take images give padded places vectors, too.
        self._alone = bool(methods.image)

    def run(
        self,
        items: Sequence[Passage],
        *,
        wide: bool = False,  # noqa: ARG002 - see `Session`
        stop: Stop | None = None,  # noqa: ARG002
    ) -> Vectors:
        """See `Session`."""
        try:
            if self._alone:
                return [one for item in items for one in self._call(item.method, [item.content])]
            return [
                vector
                for method, group in groupby(items, lambda item: item.method)
                for vector in self._call(method, [item.content for item in group])
            ]
        except Exception as exc:  # whatever its libraries raise
            raise SessionError(described(exc)) from exc

    def sample(self, tokens: int) -> Passage:
        """See `Session`."""
        return Passage("word " * tokens, self._sample, tokens)

    def _call(self, method: str, contents: list[Any]) -> Iterable[Vector]:
        embed: Callable[..., Iterable[Any]] = getattr(self._object, method)
        given = [Image.open(io.BytesIO(one)) if isinstance(one, bytes) else one for one in contents]
        return map(_vector, embed(given))


def _methods(cls: str) -> _Methods:
    return _METHODS.get(cls, _Methods())


def _class(name: str) -> Any:
    return next(cls for cls in listings() if cls.__name__ == name)


def _vector(value: Any) -> Vector:
    if isinstance(value, np.ndarray):
        return value.astype(np.float32, copy=False)
    return _entries(value.indices, value.values)


def _entries(indices: NDArray[Any], values: NDArray[Any]) -> Vector:
    entries = np.empty(len(indices), SPARSE)
    order = np.argsort(indices)
    entries["index"], entries["value"] = indices[order], values[order]
    return entries


def _size(directory: Path, file: str | None) -> int:
    return sum(one.stat().st_size for one in directory.glob(f"{file}*"))
