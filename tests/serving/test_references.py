"""References of the self-check: stored at the first load, compared at every later one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.core import SPARSE, Ids, Kind, ModelSpec, Precision, Rows, Vector
from embedding_server.runtime.session import Session, Stop, Threads
from embedding_server.serving import source as sources
from embedding_server.serving.check import CheckError, compare, run_apart
from embedding_server.serving.kinds import probes
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.references import hold, store, stored
from embedding_server.serving.source import Source
from tests.conftest import Serve
from tests.fakes import FakeSession
from tests.tiny import write_cross_encoder, write_model

BODY = {"model": "tiny", "text": "a"}
Bend = Callable[[Rows], Rows]


@pytest.fixture
def spec(models: Path) -> ModelSpec:
    """The tiny model."""
    return read_directory(models / "tiny", "tiny")


class Counted(Source):
    """A source that counts how often fp32 is opened for the sake of comparing."""

    exacts = 0

    def reference(self) -> Session:
        """See `Source`."""
        self.exacts += 1
        return super().reference()


class Elsewhere(FakeSession):
    """A session that seems to run on another provider, which bends what it gives."""

    provider = "CUDAExecutionProvider"

    def __init__(self, inner: Session, bend: Bend) -> None:
        super().__init__()
        self._inner, self._bend = inner, bend

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        return self._bend(np.asarray(self._inner.run(texts, wide=wide, stop=stop)))


def held(source: Source, session: Session | None = None) -> None:
    """Do what a load does."""
    session = session or source.open(Threads())
    items = [one.item for one in source.encoder.encode(probes(source._spec))]
    hold(source._spec, source, session, items, run_apart(session, items))


def bent(path: Path) -> list[Vector]:
    """Store other references than there are; returns them."""
    with np.load(path) as archive:
        vectors = [archive[name][::-1] for name in archive.files]
    store(vectors, path)
    return vectors


async def load_error(serve: Serve, **settings: Any) -> str | None:
    """What a server with these settings says of its load of the model, None: it serves."""
    async with serve(preload=(), **settings) as client:
        answer = await client.post("/api/embed", json=BODY)
        if answer.is_success:
            return None
        assert answer.json()["code"] == "MODEL_LOAD_ERROR"
        error: str = (await client.get("/health/status")).json()["models"]["tiny"]["error"]
        return error


async def test_a_load_is_compared_with_the_first(serve: Serve, tmp_path: Path) -> None:
    """The first load stores, the next agrees; references of something else stop it, by cosine."""
    assert await load_error(serve, cache_dir=tmp_path) is None
    (path,) = (tmp_path / "references").iterdir()
    written = path.read_bytes()
    assert await load_error(serve, cache_dir=tmp_path) is None
    assert path.read_bytes() == written
    bent(path)
    error = await load_error(serve, cache_dir=tmp_path)
    assert error
    assert "the least cosine with fp32's vectors is " in error
    assert "set INFERENCE_PRECISION=fp32" in error
    assert str(path) in error
    assert await load_error(serve, cache_dir=tmp_path, precision="int8") is None
    path.unlink()
    assert await load_error(serve, cache_dir=tmp_path) is None
    assert path.read_bytes() == written


async def test_eight_bits_store_nothing(serve: Serve, tmp_path: Path) -> None:
    """They are no reference for anybody."""
    assert await load_error(serve, cache_dir=tmp_path, precision="int8") is None
    assert not (tmp_path / "references").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\3\4", None])
def test_damaged_references_are_made_anew(
    spec: ModelSpec, tmp_path: Path, content: bytes | None
) -> None:
    """A file that cannot be read, or holds vectors of another form, is replaced."""
    source = Source(spec, RunPlan(cache=tmp_path), 1)
    held(source)
    path = source.reference_path
    assert path
    written = path.read_bytes()
    if content is None:
        store([np.ones((2, 2), np.float32)], path)
    else:
        path.write_bytes(content)
    held(source)
    assert path.read_bytes() == written


def test_cut_file_is_damaged(tmp_path: Path) -> None:
    """Whatever is missing at its end, or has changed within, it is not taken."""
    vectors = [np.arange(8, dtype=np.float32)]
    path = tmp_path / "r.npz"
    store(vectors, path)
    whole = path.read_bytes()
    found = stored(path, vectors)
    assert found
    assert np.array_equal(found[0], vectors[0])
    for length in range(0, len(whole), 16):
        path.write_bytes(whole[:length])
        assert stored(path, vectors) is None
    path.write_bytes(whole.replace(vectors[0].tobytes(), bytes(32)))
    assert stored(path, vectors) is None


def test_nowhere_to_store(spec: ModelSpec, tmp_path: Path) -> None:
    """A model is served where references can be neither read nor written."""
    source = Source(spec, RunPlan(cache=tmp_path), 1)
    (tmp_path / "references").write_text("a file")
    held(source)
    assert (tmp_path / "references").read_text() == "a file"


def test_fp32_on_the_cpu_opens_nothing(spec: ModelSpec, tmp_path: Path) -> None:
    """Its own vectors are the references."""
    source = Counted(spec, RunPlan(cache=tmp_path), 1)
    held(source)
    assert source.exacts == 0


def test_another_provider(spec: ModelSpec, tmp_path: Path) -> None:
    """It is compared with fp32 on the CPU, which is opened once on a machine, not at every load."""
    source = Counted(spec, RunPlan(cache=tmp_path), 1)
    cpu = source.open(Threads())
    held(source, Elsewhere(cpu, lambda rows: 3 * rows + 1e-4))
    assert source.exacts == 1
    with pytest.raises(CheckError, match=r"the least cosine with fp32's vectors is 0\.[0-9]{4}, "):
        held(source, Elsewhere(cpu, lambda rows: rows + 0.2))
    held(source)
    held(source, Elsewhere(cpu, lambda rows: rows))
    assert source.exacts == 1
    later = Counted(spec, RunPlan(cache=tmp_path), 1)
    held(later, Elsewhere(cpu, lambda rows: rows))
    assert later.exacts == 0


def test_large_models_are_left_alone(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph and weights over the limit are not compared."""
    source = Source(spec, RunPlan(cache=tmp_path), 1)
    size = sum(path.stat().st_size for path in tmp_path.glob("graphs/*/model.onnx*"))
    monkeypatch.setattr(sources, "_LARGEST_COMPARED", size)
    assert source.reference_path
    monkeypatch.setattr(sources, "_LARGEST_COMPARED", size - 1)
    held(source)
    assert source.reference_path is None
    assert not (tmp_path / "references").exists()


def test_what_decides_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, pooling, tokenizer and limit do; how a model runs and the runtime do not."""
    spec = read_directory(write_model(tmp_path / "m"), "m")

    def path(changed: ModelSpec = spec, **changes: Any) -> Path | None:
        return Source(changed, RunPlan(cache=tmp_path, **changes), 1).reference_path

    first = path()
    assert path(msgspec.structs.replace(spec, id="other")) == first
    assert path(reproducible=True) == path(threads_per_run=2) == first
    assert path(precision=Precision.INT8) == first
    fingerprint = Source(spec, RunPlan(cache=tmp_path), 1).fingerprint("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "VERSION", "0.0")
        assert path() == first
        assert Source(spec, RunPlan(cache=tmp_path), 1).fingerprint("cpu") != fingerprint
    others = {
        first,
        path(read_directory(write_model(tmp_path / "w", seed=1), "m")),
        path(read_directory(write_model(tmp_path / "p", pooling="cls_token"), "m")),
        path(msgspec.structs.replace(spec, max_tokens=7)),
    }
    tokenizer = tmp_path / "m" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    others.add(path())
    assert len(others) == 5


def test_cross_encoder(tmp_path: Path) -> None:
    """Scores are compared, exported graphs included."""
    spec = read_directory(write_cross_encoder(tmp_path / "m"), "m")
    source = Source(spec, RunPlan(cache=tmp_path), 1)
    held(source)
    held(source, Elsewhere(source.open(Threads()), lambda rows: rows + 5e-4))
    with pytest.raises(CheckError, match=r"a score differs by 2\.0e-03 from fp32's"):
        held(source, Elsewhere(source.open(Threads()), lambda rows: rows + 2e-3))


def dense(*numbers: float) -> Vector:
    """A vector of these numbers."""
    return np.array(numbers, np.float32)


def sparse(**entries: float) -> Vector:
    """A vector with these entries, `_3=0.5`."""
    return np.array([(int(key[1:]), value) for key, value in entries.items()], SPARSE)


@pytest.mark.parametrize(
    ("kind", "vector", "expected", "said"),
    [
        (Kind.DENSE, dense(1, 0.04), dense(2, 0), None),
        (Kind.DENSE, dense(1, 0.05), dense(2, 0), "0.9988"),
        (Kind.DENSE, dense(-1, 0), dense(1, 0), "-1.0000"),
        (Kind.DENSE, dense(1, 0), dense(np.nan, 0), "nan"),
        (Kind.STATIC, dense(0, 0), dense(0, 0), None),
        (Kind.STATIC, dense(0, 0), dense(1, 0), "0.0000"),
        (Kind.IMAGE, dense(1, 0.05), dense(1, 0), "0.9988"),
        (Kind.DENSE, dense(1, 0), dense(1, 0, 0), "shapes"),
        (Kind.MULTI, np.eye(3, dtype="f4"), 2 * np.eye(3, dtype="f4"), None),
        (Kind.MULTI, np.eye(3, dtype="f4"), np.eye(3, dtype="f4")[[0, 1, 1]], "0.0000"),
        (Kind.MULTI, np.eye(3, dtype="f4"), np.eye(3, dtype="f4")[:2], "shapes"),
        (Kind.SPARSE, sparse(_3=1, _7=0.04), sparse(_3=2), None),
        (Kind.SPARSE, sparse(_3=1, _7=0.05), sparse(_3=1), "0.9988"),
        (Kind.SPARSE, sparse(_3=1), sparse(_4=1), "0.0000"),
        (Kind.SPARSE, sparse(), sparse(), None),
        (Kind.SPARSE, sparse(), sparse(_4=1), "0.0000"),
        (Kind.CROSS, dense(-900.8), dense(-900), None),
        (Kind.CROSS, dense(-901), dense(-900), "1.1e-03"),
        (Kind.CROSS, dense(0.0009), dense(0), None),
        (Kind.CROSS, dense(0.0011), dense(0), "1.1e-03"),
        (Kind.CROSS, dense(1), dense(np.nan), "nan"),
    ],
)
def test_agreement(kind: Kind, vector: Vector, expected: Vector, said: str | None) -> None:
    """One input that is off is enough, however the others are, and the message has the number."""
    if said is None:
        compare(kind, [vector, expected], [expected, expected])
        return
    good = np.nan_to_num(expected) if kind is not Kind.SPARSE else expected
    with pytest.raises(CheckError, match=said):
        compare(kind, [good, vector], [good, expected])


def test_scores_in_half_precision() -> None:
    """Scores may be further off where weights are rounded, but not at will."""
    expected = [np.array([2.0], np.float32)]
    near, far = [expected[0] + 0.05], [expected[0] + 0.2]
    with pytest.raises(CheckError, match="a score differs"):
        compare(Kind.CROSS, near, expected)
    compare(Kind.CROSS, near, expected, Precision.BF16)
    with pytest.raises(CheckError, match="a score differs"):
        compare(Kind.CROSS, far, expected, Precision.BF16)
