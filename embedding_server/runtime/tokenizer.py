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
_MOST_CHARS_PER_TOKEN = 64
"""Last cut: of a text with fewer tokens per character, nothing beyond is read."""


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
        self._room = max_tokens - self.specials
        if self._room < 1:
            raise TokenizerError(f"{path}: a limit of {max_tokens} tokens leaves no room for text")

    @property
    def specials(self) -> int:
        """Special tokens around every text."""
        return len(self._prefix) + len(self._suffix)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """One encoding per text, in order; the GIL is free meanwhile."""
        short = [text for text in texts if len(text) <= self._room * _CHARS_PER_TOKEN]
        encoded = iter(self._backend.encode_batch_fast(short, add_special_tokens=False))
        return [
            self._finish(next(encoded).ids, cut=False)
            if len(text) <= self._room * _CHARS_PER_TOKEN
            else self._encode_long(text)
            for text in texts
        ]

    def _encode_long(self, text: str) -> Encoding:
        """Encode the beginning of a text, more of it while that gives too few tokens.

        Cutting inside a word may change its tokens, so a word that the cut ends does not count.
        """
        chars = self._room * _CHARS_PER_TOKEN
        most = self._room * _MOST_CHARS_PER_TOKEN
        while chars < len(text):
            encoding = self._backend.encode(text[:chars], add_special_tokens=False)
            words, ends = encoding.word_ids, encoding.offsets
            whole = len(words)
            if ends and ends[-1][1] == chars:
                whole = words.index(words[-1])
            if whole >= self._room or chars >= most:
                return self._finish(encoding.ids[: whole or None], cut=not text[chars:].isspace())
            chars = min(4 * chars, most)
        return self._finish(self._backend.encode(text, add_special_tokens=False).ids, cut=False)

    def _finish(self, ids: list[int], *, cut: bool) -> Encoding:
        kept = [*self._prefix, *ids[: self._room], *self._suffix]
        return Encoding(ids=np.array(kept, np.int64), truncated=cut or len(ids) > self._room)

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        start = next(
            (at for at in range(len(full)) if full[at : at + len(bare)] == bare), len(full)
        )
        return full[:start], full[start + len(bare) :]
