"""Texts -> token ids, cut to the model's limit.

Truncation and padding of the shared tokenizer stay off: they are state that concurrent calls
would share. Ids are cut here, and texts are cut by characters before that, because a tokenizer
reads all of a text before it truncates: 10 MB took 7 s and 2 GB.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from embedding_server.core import SEGMENT, Encoding, Text

_CHARS_PER_TOKEN = 8
"""First cut; English words have about 5 characters per token."""
MOST_CHARS_PER_TOKEN = 64
"""Last cut: of a text with fewer tokens per character, nothing beyond is read."""


_QUICK_CHARS = 2_000
"""About 0.3 ms."""


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
        self._path = path
        self._backend.no_truncation()
        self._backend.no_padding()
        self.max_tokens = max_tokens
        self._prefix, self._suffix = self._special_tokens()
        self._pair = self._pair_tokens()
        self._room = max_tokens - self.specials
        self._pair_room = max(0, max_tokens - sum(map(len, self._pair)))
        if self._room < 1:
            raise TokenizerError(f"{path}: a limit of {max_tokens} tokens leaves no room for text")

    @property
    def specials(self) -> int:
        """Special tokens around every text."""
        return len(self._prefix) + len(self._suffix)

    @property
    def quick_chars(self) -> int:
        """See `Encoder`."""
        return _QUICK_CHARS

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """One encoding per text or pair, in order; the GIL is free meanwhile.

        Of a pair too long, the longer text is cut first.
        """
        if pairs := [text for text in texts if isinstance(text, tuple)]:
            return self._encode_pairs(pairs)
        plain = [text for text in texts if isinstance(text, str)]
        return [self._finish(ids, cut=cut) for ids, cut in self._bare(plain)]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        # Mostly one query with many documents.
        firsts = dict.fromkeys(first for first, _ in pairs)
        bare = dict(zip(firsts, self._bare(list(firsts)), strict=True))
        seconds = self._bare([second for _, second in pairs])
        return [
            self._join(bare[first], second)
            for (first, _), second in zip(pairs, seconds, strict=True)
        ]

    def _finish(self, ids: list[int], *, cut: bool) -> Encoding:
        kept = [*self._prefix, *ids[: self._room], *self._suffix]
        return Encoding(np.array(kept, np.int64), truncated=cut or len(ids) > self._room)

    def _join(self, first: tuple[list[int], bool], second: tuple[list[int], bool]) -> Encoding:
        (one, one_cut), (two, two_cut) = first, second
        kept = longest_first(len(one), len(two), self._pair_room)
        prefix, between, suffix = self._pair
        ids = [*prefix, *one[: kept[0]], *between]
        ids += [token + self._second for token in two[: kept[1]]]
        cut = one_cut or two_cut or kept != (len(one), len(two))
        return Encoding(np.array([*ids, *suffix], np.int64), truncated=cut)

    def _bare(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Ids without special tokens, at least as many as there is room for, and whether more."""
        most = self._room * _CHARS_PER_TOKEN
        short = [text for text in texts if len(text) <= most]
        encoded = iter(self._backend.encode_batch_fast(short, add_special_tokens=False))
        return [
            (next(encoded).ids, False) if len(text) <= most else self._bare_long(text)
            for text in texts
        ]

    def _bare_long(self, text: str) -> tuple[list[int], bool]:
        """Encode the beginning of a text, more of it while that gives too few tokens.

        Cutting inside a word may change its tokens, so a word that the cut ends does not count.
        """
        chars = self._room * _CHARS_PER_TOKEN
        most = self._room * MOST_CHARS_PER_TOKEN
        while chars < len(text):
            encoding = self._backend.encode(text[:chars], add_special_tokens=False)
            words, ends = encoding.word_ids, encoding.offsets
            whole = len(words)
            if ends and ends[-1][1] == chars:
                whole = words.index(words[-1])
            if whole >= self._room or chars >= most:
                return encoding.ids[: whole or None], not text[chars:].isspace()
            chars = min(4 * chars, most)
        return self._backend.encode(text, add_special_tokens=False).ids, False

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        start = _find(full, bare, 0)
        return full[:start], full[start + len(bare) :]

    def _pair_tokens(self) -> tuple[list[int], list[int], list[int]]:
        """What the post-processor puts before, between and after the texts of a pair."""
        first, second = (self._backend.encode(one, add_special_tokens=False).ids for one in "ab")
        pair = self._backend.encode("a", "b", add_special_tokens=True)
        ids = [token + SEGMENT * kind for token, kind in zip(pair.ids, pair.type_ids, strict=True)]
        start = _find(pair.ids, first, 0)
        end = start + len(first)
        next_start = _find(pair.ids, second, end)
        self._second = SEGMENT * pair.type_ids[next_start] if next_start < len(ids) else 0
        return ids[:start], ids[end:next_start], ids[next_start + len(second) :]


def longest_first(one: int, two: int, room: int) -> tuple[int, int]:
    """How many tokens of either text stay, as the tokenizers library cuts pairs."""
    if one + two <= room:
        return one, two
    short, long = sorted((one, two))
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if one <= two else (long, short)


def _find(ids: list[int], part: list[int], start: int) -> int:
    """Where `part` is in `ids`; the end where it is not."""
    places = range(start, len(ids) - len(part) + 1)
    return next((at for at in places if ids[at : at + len(part)] == part), len(ids))
