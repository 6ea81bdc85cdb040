"""Texts -> token ids, cut to the model's limit.

Truncation and padding of the shared tokenizer stay off: they are state that concurrent calls
would share. Ids are cut here, and texts are cut by characters before that, because a tokenizer
reads all of a text before it truncates: 10 MB took 7 s and 2 GB.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from embedding_server.core import Encoding

_CHARS_PER_TOKEN = 8
"""First cut; English words have about 5 characters per token."""
_MARGIN_TOKENS = 16
"""A cut may change the tokens right before it, so that many are not trusted."""


class TokenizerError(Exception):
    """tokenizer.json is missing or damaged."""


class Tokenizer:
    """A `tokenizer.json` and a limit.

    Args:
        path: the file.
        max_tokens: longest result, special tokens included.

    Raises:
        TokenizerError: the file cannot be read.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise TokenizerError(f"{path}: {exc}") from exc
        self._backend.no_truncation()
        self._backend.no_padding()
        self.max_tokens = max_tokens
        self._prefix, self._suffix = self._special_tokens()
        self._room = max_tokens - len(self._prefix) - len(self._suffix)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """One encoding per text, in order. The calling thread holds no GIL meanwhile."""
        heads = [text[: self._room * _CHARS_PER_TOKEN] for text in texts]
        encoded = self._backend.encode_batch_fast(heads, add_special_tokens=False)
        return [
            self._finish(text, head, one.ids)
            for text, head, one in zip(texts, heads, encoded, strict=True)
        ]

    def _finish(self, text: str, head: str, ids: list[int]) -> Encoding:
        while len(head) < len(text) and len(ids) < self._room + _MARGIN_TOKENS:
            head = text[: 4 * len(head)]
            ids = self._backend.encode_batch_fast([head], add_special_tokens=False)[0].ids
        truncated = len(ids) > self._room
        kept = [*self._prefix, *ids[: self._room], *self._suffix]
        return Encoding(ids=np.array(kept, np.int64), truncated=truncated)

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        start = next(
            (at for at in range(len(full)) if full[at : at + len(bare)] == bare), len(full)
        )
        return full[:start], full[start + len(bare) :]
