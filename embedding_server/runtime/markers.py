"""Texts of late-interaction models: token ids with markers, and queries filled up with masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedding_server.core import SILENT, UNSEEN, Encoding, Ids, Markers, Query, Side, Text
from embedding_server.runtime.tokenizer import Tokenizer, TokenizerError


class MarkingTokenizer(Tokenizer):
    """A `Tokenizer` that marks its texts as `markers` say.

    Args:
        path: tokenizer.json.
        max_tokens: longest result, special tokens and marker included.
        markers: see there.

    Raises:
        TokenizerError: the file cannot be read, or a token is not in its vocabulary.
    """

    def __init__(self, path: Path, max_tokens: int, markers: Markers) -> None:
        super().__init__(path, max_tokens)
        self._expand = markers.expand
        self._query_tokens, self._document_tokens = markers.query_tokens, markers.document_tokens
        self._query = self._id(markers.query)
        self._document = self._id(markers.document)
        self._mask = self._id(markers.mask) if markers.expand else 0
        self._mask += 0 if markers.attend else UNSEEN
        self._skipped = np.array([self._first_id(char) for char in markers.skip], np.int64)

    @property
    def specials(self) -> int:
        """See `Encoder`."""
        return super().specials + 1

    def encode(self, texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        """See `Encoder`."""
        encodings = zip(texts, super().encode(texts, side=side), strict=True)
        return [self._limited(text, encoding, side) for text, encoding in encodings]

    def _limited(self, text: Text, encoding: Encoding, side: Side) -> Encoding:
        """The text within the limit of its side, marked."""
        query, ids = isinstance(text, Query), encoding.item
        limit = (self._query_tokens if query else self._document_tokens) or self.max_tokens
        cut = len(ids) >= limit
        if cut:
            excess = len(ids) - (limit - 1)
            start = len(self._prefix)
            if side == "right":
                start = len(ids) - len(self._suffix) - excess
            ids = np.delete(ids, slice(start, start + excess))
        return Encoding(self._marked(ids, query=query), encoding.truncated or cut)

    def _marked(self, ids: Ids, *, query: bool) -> Ids:
        if query:
            masks = np.full(max(0, self._expand - len(ids) - 1), self._mask)
            return np.concatenate([ids[:1], [self._query], ids[1:], masks])
        silent = np.isin(ids, self._skipped) * SILENT
        ids = ids + silent
        return np.concatenate([ids[:1], [self._document], ids[1:]])

    def _id(self, token: int | str) -> int:
        found = self._backend.token_to_id(token) if isinstance(token, str) else token
        if found is None:
            raise TokenizerError(f"{self._path}: {token!r} is not in its vocabulary")
        return found

    def _first_id(self, text: str) -> int:
        return self._backend.encode(text, add_special_tokens=False).ids[0]
