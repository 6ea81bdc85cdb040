"""Inputs of models that are more than a graph: what is cut, and what token ids are to them."""

from pathlib import Path

import numpy as np
import pytest

from embedding_server.catalog.images import ImageEncoder, sample_images
from embedding_server.catalog.objects import ObjectEncoder, Passage
from embedding_server.core import Encoding, Picture, Tokens
from embedding_server.runtime.encoder import InputError
from embedding_server.runtime.tokenizer import Tokenizer
from tests.tiny import MAX_TOKENS

LONG = "the of and " * 20


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    """The tiny model's."""
    return Tokenizer(models / "tiny" / "tokenizer.json", MAX_TOKENS)


def test_left_end_of_an_objects_text(tokenizer: Tokenizer) -> None:
    """What FastEmbed would cut at its right is refused; what it does not cut is taken."""
    counting, unlimited = ObjectEncoder("MiniCOIL", tokenizer, 1), ObjectEncoder("Bm25", None, 1)
    assert counting.encode([LONG])[0].truncated
    with pytest.raises(InputError, match="more than 32 tokens.*truncation_direction") as caught:
        counting.encode(["the of", LONG], side="left")
    assert caught.value.index == 1
    assert counting.encode(["the of"], side="left") == counting.encode(["the of"])
    assert unlimited.encode([LONG], side="left") == unlimited.encode([LONG])


def test_token_ids_for_an_object(tokenizer: Tokenizer) -> None:
    """Ids become the text that FastEmbed takes; without a tokenizer they are refused."""
    encoder = ObjectEncoder("MiniCOIL", tokenizer, 1)
    ids = Tokens([4, 6, 7])
    assert encoder.encode([ids]) == [Encoding(Passage("the of and", "embed", 5))]
    with pytest.raises(InputError, match="has token id 99999, which is not among") as caught:
        encoder.encode(["the", Tokens([99999])])
    assert caught.value.index == 1
    with pytest.raises(InputError, match="is token ids") as caught:
        ObjectEncoder("Bm25", None, 1).encode(["the", ids])
    assert caught.value.index == 1


def test_images_are_not_cut_and_have_no_ids() -> None:
    """Images are the same with either end cut; token ids are refused."""
    picture = Picture(np.zeros((3, 32, 32), np.float32))
    encoder = ImageEncoder(lambda _: picture, 1 << 20)
    files = sample_images()
    assert len(encoder.encode(files, side="left")) == len(files)
    with pytest.raises(InputError, match="is token ids") as caught:
        encoder.encode([files[0], Tokens([1])])
    assert caught.value.index == 1
