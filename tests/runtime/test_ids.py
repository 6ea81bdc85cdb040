"""Token ids as input, and what a tokenizer says of tokens: ids and texts, both ways."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from embedding_server.catalog.demo import demo_model
from embedding_server.core import Markers, Piece, Query, Side, Template, Text, Tokens
from embedding_server.runtime.encoder import InputError
from embedding_server.runtime.markers import MarkingTokenizer
from embedding_server.runtime.template import TemplateTokenizer
from embedding_server.runtime.tokenizer import Tokenizer
from tests.tiny import MAX_TOKENS, VOCABULARY, write_model

CLS, SEP, THE, OF, AND = 2, 3, 4, 6, 7
TEXT = st.text(alphabet="the of and zq!\u00e9\u6f22", max_size=90)
SIDES: list[Side] = ["left", "right"]


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """The tiny model's tokenizer.json."""
    with tempfile.TemporaryDirectory() as scratch:
        yield write_model(Path(scratch, "m")) / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer(path, MAX_TOKENS)


@pytest.fixture(scope="module")
def backend(path: Path) -> Backend:
    """The same without a limit, as others load it."""
    found = Backend.from_file(str(path))
    found.no_padding()
    found.no_truncation()
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("specials", [True, False])
@given(texts=st.lists(TEXT, max_size=4))
def test_ids_are_the_text(
    tokenizer: Tokenizer, backend: Backend, texts: list[str], side: Side, *, specials: bool
) -> None:
    """A text's ids encode as the text does, cut or whole, with its special tokens or without."""
    rows = [Tokens(backend.encode(text, add_special_tokens=specials).ids) for text in texts]
    mixed: list[Text] = [*rows, *texts]
    given = [(one.item.tolist(), one.truncated) for one in tokenizer.encode(mixed, side=side)]
    assert given[: len(rows)] == given[len(rows) :]


def test_unknown_ids_are_refused(tokenizer: Tokenizer) -> None:
    """An id that is not in the vocabulary is named, with its place, the size and a way out."""
    size = len(set(VOCABULARY))
    for wrong in (len(VOCABULARY), -1, 1 << 70):
        said = rf"has token id {wrong}, which is not among the model's {size}; .*cl100k_base"
        with pytest.raises(InputError, match=said) as caught:
            tokenizer.encode(["the", Tokens([OF, wrong])])
        assert caught.value.index == 1
        with pytest.raises(InputError, match=said) as caught:
            tokenizer.decode([[THE], [OF], [wrong]], skip_specials=False)
        assert caught.value.index == 2
    last = len(VOCABULARY) - 1
    assert last >= size  # a word is in it twice, so an id is left out
    assert tokenizer.encode([Tokens([last])])[0].item.tolist() == [CLS, last, SEP]


def test_added_tokens_count_as_vocabulary(tmp_path: Path) -> None:
    """A token that was added behind the vocabulary is known."""
    model = write_model(tmp_path / "m")
    changed = Backend.from_file(str(model / "tokenizer.json"))
    changed.add_tokens(["[NEW]", "[NEWER]"])
    changed.save(str(model / "tokenizer.json"))
    added = changed.token_to_id("[NEWER]")
    assert added is not None
    assert added >= len(VOCABULARY)
    of_text, of_ids = Tokenizer(model / "tokenizer.json", 8).encode(["[NEWER]", Tokens([added])])
    assert of_text.item.tolist() == of_ids.item.tolist() == [CLS, added, SEP]


@pytest.mark.parametrize("side", SIDES)
def test_marked_texts_are_cut_at_either_side(path: Path, side: Side) -> None:
    """A late-interaction model's texts keep both special tokens and their marker, as ids, too."""
    markers = Markers(query="[MASK]", document="<mask>", document_tokens=8, query_tokens=7)
    tokenizer = MarkingTokenizer(path, MAX_TOKENS, markers)
    query, document = VOCABULARY.index("[MASK]"), VOCABULARY.index("<mask>")
    words = [THE, *[OF] * 10, AND]
    text = "the " + "of " * 10 + "and"
    texts: list[Text] = [text, Tokens(words), Tokens([CLS, *words, SEP]), Query(text)]
    *documents, asked = [one.item.tolist() for one in tokenizer.encode(texts, side=side)]
    kept = {"left": (words[-5:], words[-4:]), "right": (words[:5], words[:4])}[side]
    assert documents == [[CLS, document, *kept[0], SEP]] * 3
    assert asked == [CLS, query, *kept[1], SEP]


def test_templates_are_cut_within(path: Path) -> None:
    """Of a pair in a template either end is cut, and what stands around the pair stays."""
    template = Template(prefix="you", body=("the ", " and "), suffix="it")
    tokenizer = TemplateTokenizer(path, 8, template)
    around = [VOCABULARY.index(word) for word in ("you", "it")]
    pair = ("of of", "of the of the")
    (left,), (right,) = (tokenizer.encode([pair], side=side) for side in SIDES)
    assert left.item.tolist() == [around[0], OF, AND, OF, THE, OF, THE, around[1]]
    assert right.item.tolist() == [around[0], THE, OF, OF, AND, OF, THE, around[1]]
    with pytest.raises(InputError, match="is token ids") as caught:
        tokenizer.encode([pair, Tokens([THE])])
    assert caught.value.index == 1


def test_pieces(tokenizer: Tokenizer) -> None:
    """A text's tokens are given as slices of it, special ones by their name and without a place."""
    ((*_, z, q, mark, sep), empty) = tokenizer.pieces(["The \u6f22 zq!", ""], specials=True)
    assert z == Piece(id=VOCABULARY.index("z"), text="z", start=6, stop=7)
    assert q == Piece(id=VOCABULARY.index("##q"), text="q", start=7, stop=8)
    assert (mark.text, mark.start, mark.stop) == ("!", 8, 9)
    assert sep == Piece(id=SEP, text="[SEP]", special=True)
    assert [piece.id for piece in empty] == [CLS, SEP]
    ((the, _),) = tokenizer.pieces(["The of"], specials=False)
    assert the == Piece(id=THE, text="The", start=0, stop=3)


def test_pieces_are_never_cut(tokenizer: Tokenizer) -> None:
    """A text over the model's limit keeps all its tokens; one that is far over it is refused."""
    (pieces,) = tokenizer.pieces(["the " * 500], specials=False)
    assert [piece.id for piece in pieces] == [THE] * 500
    with pytest.raises(InputError, match="has 2800 characters, at most 2048") as caught:
        tokenizer.pieces(["the", "the of " * 400], specials=True)
    assert caught.value.index == 1


def test_decode(tokenizer: Tokenizer) -> None:
    """Ids become texts, with their special tokens or without."""
    rows = [[CLS, THE, OF, SEP], []]
    assert tokenizer.decode(rows, skip_specials=False)[0].split() == ["[CLS]", "the", "of", "[SEP]"]
    demo = demo_model()
    known = Tokenizer(demo.directory / "tokenizer.json", demo.max_tokens)
    ids = known.encode(["Embed incomprehensibilities."])[0].item.tolist()
    assert known.decode([ids, []], skip_specials=True) == ["embed incomprehensibilities.", ""]


@given(st.lists(TEXT, max_size=4), st.integers(1, 12))
def test_shortened(tokenizer: Tokenizer, texts: list[str], tokens: int) -> None:
    """A text is left with its first characters that make so many tokens, or unchanged."""
    for text, short in zip(texts, tokenizer.shortened(texts, tokens), strict=True):
        whole, kept = (pieces_of(tokenizer, one) for one in (text, short))
        assert text.startswith(short)
        assert kept == whole[: len(kept)]
        assert (short == text) if len(whole) <= tokens else (len(kept) == tokens)


def test_shortened_reads_beginnings_only(tokenizer: Tokenizer) -> None:
    """What is short by its bytes is not read at all, and of a huge text only the beginning."""
    huge = "the of and to " * 700_000
    backend, seen = tokenizer._backend, 0

    class Recorder:
        def encode_batch(self, texts: list[str], **options: bool) -> object:
            assert texts == []
            return []

        def encode(self, text: str, **options: bool) -> object:
            nonlocal seen
            seen += len(text)
            return backend.encode(text, **options)

    recording = Tokenizer(tokenizer._path, MAX_TOKENS)
    recording._backend = Recorder()  # type: ignore[assignment]
    short = "the of and"
    assert recording.shortened([short, huge], 12) == [short, ("the of and to " * 3).strip()]
    assert 0 < seen < 1000


def test_a_character_of_several_tokens_is_not_cut_through(tmp_path: Path) -> None:
    """Where the bytes of a character are tokens of their own, it stays whole or goes."""
    path = write_bytes_tokenizer(tmp_path)
    text = "a\u6f22b"
    shortened = [Tokenizer(path, 8).shortened([text], tokens)[0] for tokens in range(6)]
    assert shortened == ["", "a", "a", "a", "a\u6f22", text]


def write_bytes_tokenizer(directory: Path) -> Path:
    """A tokenizer.json whose tokens are bytes."""
    from tokenizers import models, pre_tokenizers  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {char: index for index, char in enumerate(alphabet)}
    made = Backend(models.BPE(tokens, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def pieces_of(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """Its tokens, none of them special."""
    return tokenizer.pieces([text], specials=False)[0]
