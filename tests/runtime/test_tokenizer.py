"""Tokenising: limits, special tokens, and texts that are far too long."""

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from embedding_server.catalog.demo import demo_model
from embedding_server.core import SEGMENT, Side
from embedding_server.runtime.tokenizer import Tokenizer, TokenizerError
from tests.tiny import MAX_TOKENS, write_model

CLS, SEP = 2, 3
TEXT = st.text(alphabet="the of and zq!", max_size=60)


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    """The tiny model's tokenizer, whose file asks for truncation and padding to 8."""
    return Tokenizer(models / "tiny" / "tokenizer.json", MAX_TOKENS)


def test_file_settings_are_cleared(tokenizer: Tokenizer) -> None:
    """Truncation and padding that the file asks for do not happen."""
    short, long = tokenizer.encode(["the", "the of " * 10])
    assert short.item.tolist() == [CLS, 4, SEP]
    assert len(long.item) == 22
    assert not long.truncated


@pytest.mark.parametrize(
    ("words", "truncated"), [(29, False), (30, False), (31, True), (500, True)]
)
def test_cut_keeps_special_tokens(tokenizer: Tokenizer, words: int, truncated: bool) -> None:  # noqa: FBT001
    """A text over the limit keeps its first tokens and both special ones."""
    (encoding,) = tokenizer.encode([" ".join(["the"] * words)])
    assert len(encoding.item) == min(words + 2, MAX_TOKENS)
    assert (encoding.item[0], encoding.item[-1]) == (CLS, SEP)
    assert encoding.truncated is truncated


def test_sparse_text_is_read_on(tokenizer: Tokenizer) -> None:
    """Where the first characters give too few tokens, more are read, up to a limit."""
    (encoding,) = tokenizer.encode([" " * 1000 + "the of and"])
    assert encoding.item.tolist() == [CLS, 4, 6, 7, SEP]
    assert not encoding.truncated
    (encoding,) = tokenizer.encode(["the of" + " " * 1_000_000])
    assert encoding.item.tolist() == [CLS, 4, 6, SEP]
    assert not encoding.truncated
    (encoding,) = tokenizer.encode([" " * 1_000_000 + "the of and"])
    assert encoding.item.tolist() == [CLS, SEP]
    assert encoding.truncated


def test_cut_at_the_left_keeps_special_tokens(tokenizer: Tokenizer) -> None:
    """Cut at its left, a text keeps its last tokens, between the special ones."""
    for words in (40, 4000):
        (encoding,) = tokenizer.encode(["of " * words + "the and to"], side="left")
        assert encoding.item.tolist() == [CLS, *[6] * 27, 4, 7, 8, SEP]
        assert encoding.truncated
    (encoding,) = tokenizer.encode(["of the"], side="left")
    assert encoding.item.tolist() == [CLS, 6, 4, SEP]
    assert not encoding.truncated


def test_sparse_text_is_read_back(tokenizer: Tokenizer) -> None:
    """Where the last characters give too few tokens, more are read, up to a limit."""
    (encoding,) = tokenizer.encode(["the of and" + " " * 1000], side="left")
    assert encoding.item.tolist() == [CLS, 4, 6, 7, SEP]
    assert not encoding.truncated
    (encoding,) = tokenizer.encode([" " * 1_000_000 + "the of"], side="left")
    assert encoding.item.tolist() == [CLS, 4, 6, SEP]
    assert not encoding.truncated
    (encoding,) = tokenizer.encode(["the of and" + " " * 1_000_000], side="left")
    assert encoding.item.tolist() == [CLS, SEP]
    assert encoding.truncated


def test_no_room_for_text(models: Path) -> None:
    """A limit that the special tokens use up is an error."""
    with pytest.raises(TokenizerError, match="no room"):
        Tokenizer(models / "tiny" / "tokenizer.json", 2)


def test_a_word_at_the_cut_does_not_count() -> None:
    """A long word that the cut by characters shortens gives the tokens it gives whole."""
    spec = demo_model()
    text = "between " * 245 + "x" * 300
    (encoding,) = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens).encode([text])
    assert len(encoding.item) == 248
    assert not encoding.truncated


def test_a_word_that_the_cut_begins_in_does_not_count() -> None:
    """The end of a long word, cut at its left, gives the tokens that the whole word gives."""
    spec = demo_model()
    text = "x" * 300 + " between" * 245
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    (encoding,) = tokenizer.encode([text], side="left")
    assert len(encoding.item) == 248
    assert not encoding.truncated


@pytest.mark.parametrize("side", ["left", "right"])
def test_same_ids_as_the_whole_text(side: Side) -> None:
    """Cutting by characters first does not change the ids that are kept."""
    spec = demo_model()
    path = spec.directory / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.no_padding()
    backend.enable_truncation(spec.max_tokens, direction=side)
    texts = ["incomprehensibilities " * 500, "漢字" * 2000, "a, " * 4000, "x" * 300 + " y" * 5000]
    encodings = Tokenizer(path, spec.max_tokens).encode(texts, side=side)
    for text, encoding in zip(texts, encodings, strict=True):
        assert encoding.item.tolist() == backend.encode(text).ids
        assert encoding.truncated


@pytest.mark.parametrize("side", ["left", "right"])
def test_huge_text_is_not_read(tokenizer: Tokenizer, side: Side) -> None:
    """Of a text of 10 MB the backend sees no more than a few characters per token."""
    seen = 0

    class Recorder:
        def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
            assert texts == []
            return []

        def encode(self, text: str, **options: bool) -> Any:
            nonlocal seen
            seen += len(text)
            return backend.encode(text, **options)

    backend = tokenizer._backend
    tokenizer._backend = cast(Any, Recorder())
    (encoding,) = tokenizer.encode(["the of and to " * 700_000], side=side)
    assert encoding.truncated
    assert 0 < seen < 100 * MAX_TOKENS


def test_damaged_file(tmp_path: Path) -> None:
    """A damaged file is an error that names it."""
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(path, 8)


@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    st.integers(8, 40),
    st.sampled_from(["left", "right"]),
)
def test_pairs_are_cut_like_the_library_does(
    pairs: list[tuple[str, str]], limit: int, side: Side
) -> None:
    """A pair too long loses tokens of its longer text, as with the tokenizers library itself."""
    with tempfile.TemporaryDirectory() as scratch:
        path = write_model(Path(scratch, "m")) / "tokenizer.json"
        ours = Tokenizer(path, limit).encode(pairs, side=side)
        reference = Backend.from_file(str(path))
    reference.no_padding()
    reference.enable_truncation(limit, strategy="longest_first", direction=side)
    for one, pair in zip(ours, pairs, strict=True):
        expected = reference.encode(*pair)
        assert (one.item % SEGMENT).tolist() == expected.ids
        assert (one.item // SEGMENT).tolist() == expected.type_ids
        assert one.truncated == bool(expected.overflowing)
