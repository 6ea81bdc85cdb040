"""Loading: the self-check, and a cache that is damaged."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.core import Ids, ModelSpec, Rows
from embedding_server.runtime.tokenizer import Tokenizer
from embedding_server.serving.loader import LoadError, check
from tests.conftest import Serve
from tests.fakes import FakeSession

Bend = Callable[[Rows], Rows]


@pytest.fixture
def spec(models: Path) -> ModelSpec:
    """The tiny model."""
    return read_directory(models / "tiny", "tiny")


class Session(FakeSession):
    """A session whose rows the test bends."""

    def __init__(self, bend: Bend, width: int) -> None:
        super().__init__(width=width)
        self._bend = bend

    def run(self, texts: Sequence[Ids], *, wide: bool = False) -> Rows:
        """See `Session`."""
        return self._bend(super().run(texts, wide=wide))


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda rows: rows[:, :-1], "width"),
        (lambda rows: rows * 0, "not finite, or zero"),
        (lambda rows: rows * np.nan, "not finite, or zero"),
        (lambda rows: rows * (np.nan if len(rows) == 1 else 1), "not finite, or zero"),
        (lambda rows: rows + len(rows), "with its neighbours"),
    ],
)
def test_self_check(spec: ModelSpec, bend: Bend, said: str) -> None:
    """Rows of another width, not finite, zero, or changed by their neighbours are refused."""
    tokenizer = Tokenizer(spec.directory / "tokenizer.json", spec.max_tokens)
    with pytest.raises(LoadError, match=said):
        check(spec, tokenizer, Session(bend, spec.dimensions))
    check(spec, tokenizer, Session(lambda rows: rows, spec.dimensions))


async def test_damaged_cache_is_made_anew(serve: Serve, tmp_path: Path) -> None:
    """A graph in the cache that cannot be opened is dropped and converted again."""
    async with serve(cache_dir=tmp_path):
        pass
    for graph in tmp_path.glob("graphs/*/model.onnx"):
        graph.write_bytes(graph.read_bytes()[:1000])
    async with serve(cache_dir=tmp_path, preload=()) as client:
        body = {"model": "tiny", "text": "a"}
        assert (await client.post("/api/embed", json=body)).status_code == 503
    async with serve(cache_dir=tmp_path, preload=()) as client:
        assert (await client.post("/api/embed", json=body)).status_code == 200
