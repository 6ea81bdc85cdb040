"""The demo model against sentence-transformers on the same weights, in fp32."""

from pathlib import Path

import numpy as np
import pytest

from embedding_server.catalog.demo import demo_model
from embedding_server.convert import convert
from embedding_server.core import Ids, ModelSpec, Pooling, Precision, Rows, normalized
from embedding_server.runtime.cores import sums_bytes_exactly
from embedding_server.runtime.session import OnnxSession, Session, Threads
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.source import Source

GOLDENS = Path(__file__).parent / "goldens" / "minilm.npz"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """The demo model."""
    return demo_model()


@pytest.fixture(scope="module")
def session(spec: ModelSpec, cache: Path) -> OnnxSession:
    """Its session."""
    graph = convert(spec, cache)
    return OnnxSession(graph, cores=1)


@pytest.fixture(scope="module")
def texts(spec: ModelSpec) -> list[Ids]:
    """The goldens' texts as ids."""
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    return [encoding.item for encoding in tokenizer.encode(np.load(GOLDENS)["texts"].tolist())]


@pytest.fixture(scope="module")
def int8(spec: ModelSpec, cache: Path) -> Session:
    """Its session in 8 bits, as the server makes it."""
    return Source(spec, RunPlan(cache=cache, precision=Precision.INT8), 2).open(Threads())


def compare(rows: Rows) -> None:
    """The bar: cosine >= 0.99999 and max abs difference <= 1e-5."""
    expected = np.load(GOLDENS)["rows"]
    assert rows.shape == expected.shape == (30, 384)
    assert np.sum(rows * expected, axis=1).min() >= 0.99999
    assert np.abs(rows - expected).max() <= 1e-5


def test_spec_says_what_the_files_say(spec: ModelSpec) -> None:
    """Limit, width and pooling come from the files beside the weights."""
    assert (spec.max_tokens, spec.dimensions, spec.pooling) == (256, 384, Pooling.MEAN)


def test_alone(session: Session, texts: list[Ids]) -> None:
    """Each text in a run of its own."""
    compare(normalized(np.concatenate([session.run([ids]) for ids in texts])))


def test_all_in_one_batch(session: Session, texts: list[Ids]) -> None:
    """Texts of 2 to 256 tokens together."""
    compare(normalized(session.run(texts)))


def test_int8(int8: Session, texts: list[Ids]) -> None:
    """8 bits keep every text's direction, bit by bit the same whatever it is batched with."""
    alone = np.concatenate([int8.run([ids]) for ids in texts])
    cosines = np.sum(normalized(alone) * np.load(GOLDENS)["rows"], axis=1)
    assert cosines.min() >= (0.99 if sums_bytes_exactly() else 0.985)
    assert np.abs(normalized(int8.run(texts)) - normalized(alone)).max() <= 1e-3


def test_reproducible(spec: ModelSpec, cache: Path, texts: list[Ids]) -> None:
    """Not one bit depends on what else is in a batch, or on how many cores are free."""
    plan = RunPlan(cache=cache, reproducible=True)
    session = Source(spec, plan, 2).open(Threads())
    alone = np.concatenate([session.run([ids]) for ids in texts])
    compare(normalized(alone))
    for wide in (False, True):
        assert np.array_equal(session.run(texts[::-1], wide=wide)[::-1], alone)
