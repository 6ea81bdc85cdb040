"""A resident model: tokenising and guessing costs, of texts and of token ids."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.catalog.objects import ObjectEncoder
from embedding_server.core import Tokens
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.encoder import Encoder
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.cost import Cost
from embedding_server.serving.device import Device
from embedding_server.serving.model import Model, TextTooLong
from embedding_server.serving.profile import Profile
from embedding_server.serving.tuning import Way
from tests.fakes import MEMORY, FakeSession
from tests.tiny import MAX_TOKENS

CLS, SEP, THE, OF = 2, 3, 4, 6
METRICS = Metrics("test")


@pytest.fixture
def executor() -> Iterator[Executor]:
    """The thread that larger requests are tokenised on."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    """The tiny model's."""
    return Tokenizer(models / "tiny" / "tokenizer.json", MAX_TOKENS)


@pytest.fixture
def model(models: Path, tokenizer: Tokenizer, executor: Executor) -> Model:
    """The tiny model, with a session that is not run."""
    return model_of(tokenizer, models, executor)


def model_of(encoder: Encoder, models: Path, executor: Executor) -> Model:
    """A model with that encoder."""
    profile = Profile(Cost(), Way(), 0.0)
    device = Device(1, 64, MEMORY, METRICS)
    return Model(
        read_directory(models / "tiny", "tiny"),
        encoder,
        Batcher("tiny", FakeSession(), device, METRICS, profile=profile),
        executor,
        METRICS,
        fingerprint="",
        quality=None,
        calibration=None,
    )


@pytest.mark.parametrize("words", [40, 4000])
async def test_the_left_end_is_cut_on_any_thread(model: Model, words: int) -> None:
    """Small and large requests keep the end of a text where the left is cut off."""
    text = "the " * words + "of"
    (encoding,) = await model.tokenize([text], truncate=True, side="left")
    assert encoding.item.tolist() == [CLS, *[THE] * 29, OF, SEP]
    with pytest.raises(TextTooLong):
        await model.tokenize([text], truncate=False, side="left")


async def test_token_ids_cost_as_texts_and_teach_nothing(model: Model) -> None:
    """An id is taken for four characters, and requests with ids do not change that guess."""
    tokens = Tokens([THE] * 10)
    guess = model.estimate([tokens])
    assert guess == model.estimate(["x" * 40])
    await model.tokenize([tokens, "a b c d e f"], truncate=True)
    assert model.estimate([tokens]) == guess
    await model.tokenize(["a b c d e f"], truncate=True)
    assert model.estimate([tokens]) != guess


def test_its_tokenizer(
    model: Model, models: Path, tokenizer: Tokenizer, executor: Executor
) -> None:
    """It is what encodes its texts, or what counts those of FastEmbed's objects, if anything."""
    assert model.tokenizer is tokenizer
    counting, unlimited = ObjectEncoder("MiniCOIL", tokenizer, 1), ObjectEncoder("Bm25", None, 1)
    assert model_of(counting, models, executor).tokenizer is tokenizer
    assert model_of(unlimited, models, executor).tokenizer is None
