"""Texts -> token ids, cut to the model's limit; and ids -> texts.

Truncation and padding of the shared tokenizer stay off: they are state that concurrent calls
would share. Ids are cut here, and texts are cut by characters before that, because a tokenizer
reads all of a text before it truncates: 10 MB took 7 s and 2 GB.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding as Read
from tokenizers import Tokenizer as Backend

from embedding_server.core import SEGMENT, Encoding, Piece, Side, Text, Tokens
from embedding_server.runtime.encoder import InputError

_CHARS_PER_TOKEN = 8
"""First cut; English words have about 5 characters per token."""
MOST_CHARS_PER_TOKEN = 64
"""Last cut: of a text with fewer tokens per character, nothing beyond is read."""


_QUICK_CHARS = 2_000
"""About 0.3 ms."""
_ALL = slice(None)
_SHOWN_DIGITS = 24
_ADVICE = (
    "send ids of this model's own tokenizer, or text; for clients that send OpenAI's ids, set "
    "token_ids: cl100k_base in the model configuration"
)


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
        self._vocabulary = self._backend.get_vocab_size()
        self._room = max_tokens - self.specials
        self._pair_room = max(0, max_tokens - sum(map(len, self._pair)))
        if self._room < 1:
            raise TokenizerError(f"{path}: a limit of {max_tokens} tokens leaves no room for text")

    @property
    def tokenizer(self) -> "Tokenizer":
        """Itself: see `Encoder`."""
        return self

    @property
    def specials(self) -> int:
        """Special tokens around every text."""
        return len(self._prefix) + len(self._suffix)

    @property
    def quick_chars(self) -> int:
        """See `Encoder`."""
        return _QUICK_CHARS

    def encode(self, texts: Sequence[Text], *, side: Side = "right") -> list[Encoding]:
        """One encoding per input, in order: texts and ids of texts, or pairs; the GIL is free.

        Of a pair too long, the longer text is cut first. Ids get the special tokens around them,
        unless they have them.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        plain = [text for text in texts if isinstance(text, str)]
        if len(plain) < len(texts):
            return self._encode_others(texts, plain, side)
        return [self._finish(ids, side, cut=cut) for ids, cut in self._bare(plain, side)]

    def pieces(self, texts: Sequence[str], *, specials: bool) -> list[list[Piece]]:
        """All tokens of every text, with special ones around them or without.

        Raises:
            InputError: a text is longer than what is ever read of one.
        """
        most = self.max_tokens * MOST_CHARS_PER_TOKEN
        for index, text in enumerate(texts):
            if len(text) > most:
                raise InputError(index, f"has {len(text)} characters, at most {most} are allowed")
        read = self._backend.encode_batch(list(texts), add_special_tokens=specials)
        return [_pieces(text, one) for text, one in zip(texts, read, strict=True)]

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """The text of each row of ids, as far as the tokenizer has kept it.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        rows = [list(row) for row in ids]
        for index, row in enumerate(rows):
            self._check(index, row)
        return self._backend.decode_batch(rows, skip_special_tokens=skip_specials)

    def shortened(self, texts: Sequence[str], tokens: int) -> list[str]:
        """The texts, cut at a character where they have more than so many tokens.

        Special tokens do not count. A token is taken to stand for at least a byte of UTF-8.
        """
        most = tokens * _CHARS_PER_TOKEN
        short = [text for text in texts if len(text) <= most and not _fits(text, tokens)]
        known = iter(self._backend.encode_batch(short, add_special_tokens=False))
        shortened = []
        for text in texts:
            if _fits(text, tokens):
                shortened.append(text)
            elif len(text) <= most:
                shortened.append(_beginning(text, next(known), tokens, cut=False))
            else:
                read, _, cut = self._read_long(text, tokens, "right")
                shortened.append(_beginning(text, read, tokens, cut=cut))
        return shortened

    def _encode_others(
        self, texts: Sequence[Text], plain: Sequence[str], side: Side
    ) -> list[Encoding]:
        """Encode pairs, or texts and ids, of which `plain` are the texts."""
        pairs = [text for text in texts if isinstance(text, tuple) and not isinstance(text, Tokens)]
        if pairs:
            return self._encode_pairs(pairs, side)
        bare = iter(self._bare(plain, side))
        read = [
            (self._unframed(index, text), False) if isinstance(text, Tokens) else next(bare)
            for index, text in enumerate(texts)
        ]
        return [self._finish(ids, side, cut=cut) for ids, cut in read]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]], side: Side) -> list[Encoding]:
        # Mostly one query with many documents.
        firsts = dict.fromkeys(first for first, _ in pairs)
        bare = dict(zip(firsts, self._bare(list(firsts), side), strict=True))
        seconds = self._bare([second for _, second in pairs], side)
        return [
            self._join(bare[first], second, side)
            for (first, _), second in zip(pairs, seconds, strict=True)
        ]

    def _unframed(self, index: int, tokens: Tokens) -> list[int]:
        """The ids of a text without the special tokens around it."""
        self._check(index, tokens)
        ids, start, end = list(tokens), len(self._prefix), len(tokens) - len(self._suffix)
        framed = start <= end and ids[:start] == self._prefix and ids[end:] == self._suffix
        return ids[start:end] if framed else ids

    def _check(self, index: int, ids: Sequence[int]) -> None:
        if not ids or (min(ids) >= 0 and max(ids) < self._vocabulary):
            return
        wrong = next((token for token in ids if not self._knows(token)), None)
        if wrong is not None:
            shown, size = str(wrong)[:_SHOWN_DIGITS], self._vocabulary
            fault = f"has token id {shown}, which is not among the model's {size}"
            raise InputError(index, f"{fault}; {_ADVICE}")

    def _knows(self, token: int) -> bool:
        if 0 <= token < self._vocabulary:
            return True
        # Where a vocabulary has gaps, ids are beyond its size.
        return 0 <= token < 1 << 32 and self._backend.id_to_token(token) is not None

    def _finish(self, ids: list[int], side: Side, *, cut: bool) -> Encoding:
        kept = [*self._prefix, *_kept(ids, self._room, side), *self._suffix]
        return Encoding(np.array(kept, np.int64), truncated=cut or len(ids) > self._room)

    def _join(
        self, first: tuple[list[int], bool], second: tuple[list[int], bool], side: Side
    ) -> Encoding:
        (one, one_cut), (two, two_cut) = first, second
        kept = longest_first(len(one), len(two), self._pair_room)
        prefix, between, suffix = self._pair
        ids = [*prefix, *_kept(one, kept[0], side), *between]
        ids += [token + self._second for token in _kept(two, kept[1], side)]
        cut = one_cut or two_cut or kept != (len(one), len(two))
        return Encoding(np.array([*ids, *suffix], np.int64), truncated=cut)

    def _bare(self, texts: Sequence[str], side: Side) -> list[tuple[list[int], bool]]:
        """Ids without special tokens, at least as many as there is room for, and whether more."""
        most = self._room * _CHARS_PER_TOKEN
        short = [text for text in texts if len(text) <= most]
        encoded = iter(self._backend.encode_batch_fast(short, add_special_tokens=False))
        return [
            (next(encoded).ids, False) if len(text) <= most else self._bare_long(text, side)
            for text in texts
        ]

    def _bare_long(self, text: str, side: Side) -> tuple[list[int], bool]:
        read, whole, cut = self._read_long(text, self._room, side)
        return read.ids[whole], cut

    def _read_long(self, text: str, room: int, side: Side) -> tuple[Read, slice, bool]:
        """Encode one end of a text, more of it while that gives too few tokens.

        Cutting inside a word may change its tokens, so a word that is cut does not count: the
        tokens that do, and whether there are more.
        """
        chars, most = room * _CHARS_PER_TOKEN, room * MOST_CHARS_PER_TOKEN
        while chars < len(text):
            end = len(text) - chars
            part, rest = (
                (text[:chars], text[chars:]) if side == "right" else (text[end:], text[:end])
            )
            read = self._backend.encode(part, add_special_tokens=False)
            whole = _whole(read, chars, side)
            count = whole.stop - whole.start
            if count >= room or chars >= most:
                return read, whole if count else _ALL, not rest.isspace()
            chars = min(4 * chars, most)
        return self._backend.encode(text, add_special_tokens=False), _ALL, False

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


def _whole(read: Read, chars: int, side: Side) -> slice:
    """Which tokens are of words that a cut after so many characters does not go through."""
    words, spans = read.word_ids, read.offsets
    start, stop = 0, len(words)
    if side == "right" and spans and spans[-1][1] == chars:
        stop = words.index(words[-1])
    if side == "left" and spans and spans[0][0] == 0:
        start = stop - words[::-1].index(words[0])
    return slice(start, stop)


def _fits(text: str, tokens: int) -> bool:
    """Whether its bytes, and so its tokens, are not more than that."""
    return len(text) <= tokens and len(text.encode()) <= tokens


def _beginning(text: str, read: Read, tokens: int, *, cut: bool) -> str:
    """As much of a text as its first tokens are of; `cut`: it has more than were `read`."""
    spans = read.offsets
    if len(spans) > tokens:
        # A character may have several tokens.
        return text[: min(spans[tokens - 1][1], spans[tokens][0])]
    if cut:
        return text[: spans[-1][1] if spans else 0]
    return text


def _pieces(text: str, read: Read) -> list[Piece]:
    tokens = zip(read.ids, read.tokens, read.special_tokens_mask, read.offsets, strict=True)
    return [
        Piece(id=token, text=name, special=True)
        if special
        else Piece(id=token, text=text[start:stop], start=start, stop=stop)
        for token, name, special, (start, stop) in tokens
    ]


def _kept(ids: list[int], room: int, side: Side) -> list[int]:
    if len(ids) <= room:
        return ids
    return ids[:room] if side == "right" else ids[len(ids) - room :]


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
