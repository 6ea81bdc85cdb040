"""Ranges for 8-bit numbers: the same for a model whenever and however it is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedding_server.api.encode import quantized
from embedding_server.catalog.demo import demo_model
from embedding_server.catalog.local import read_directory
from embedding_server.core import Ids, ModelSpec, Precision, Rows, normalized
from embedding_server.runtime.session import Session, Stop, Threads
from embedding_server.serving.calibration import Calibration, calibrated
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.references import store
from embedding_server.serving.source import Source
from embedding_server.serving.texts import CALIBRATION, JUDGEMENT
from tests.api.test_own_kinds import write_all
from tests.conftest import Serve, parts_of
from tests.fakes import FakeSession
from tests.tiny import export, write_model


@pytest.fixture
def spec(models: Path) -> ModelSpec:
    """The tiny model."""
    return read_directory(models / "tiny", "tiny")


class Counted(FakeSession):
    """A session that counts the texts it runs, and gives no numbers for some."""

    def __init__(self, inner: Session, failing: int = 0) -> None:
        super().__init__()
        self._inner, self._failing, self.texts = inner, failing, 0

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`."""
        self.texts += len(texts)
        rows = np.array(self._inner.run(texts, wide=wide, stop=stop))
        rows[: self._failing] = np.nan
        return rows


def source_of(spec: ModelSpec, cache: Path, **plan: Any) -> Source:
    """Where the model's sessions come from."""
    return Source(spec, RunPlan(cache=cache, **plan), 1)


def known(spec: ModelSpec, source: Source, session: Session | None = None) -> Calibration:
    """What a load finds."""
    found = calibrated(spec, source, session or source.open(Threads()))
    assert found
    return found


def raw(source: Source, texts: Sequence[str]) -> Rows:
    """Raw vectors of texts, each alone, shape (texts, width)."""
    session = source.open(Threads())
    return np.concatenate([session.run([one.item]) for one in source.encoder.encode(texts)])


def test_computed_once(spec: ModelSpec, tmp_path: Path) -> None:
    """The first load runs the texts; a restart reads what it found, and has the same range."""
    source = source_of(spec, tmp_path)
    session = Counted(source.open(Threads()))
    first = known(spec, source, session)
    assert session.texts == len(first.vectors) == 37
    again = known(spec, source_of(spec, tmp_path), session)
    assert session.texts == 37
    assert np.array_equal(again.vectors, first.vectors)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\3\4", None])
def test_damaged_file_is_made_anew(spec: ModelSpec, tmp_path: Path, content: bytes | None) -> None:
    """What cannot be read, or has another form, is replaced; so is a file that was removed."""
    source = source_of(spec, tmp_path)
    first, path = known(spec, source), source.calibration_path
    written = path.read_bytes()
    if content is None:
        store([np.ones((2, 2), np.float32)], path)
    else:
        path.write_bytes(content)
    assert np.array_equal(known(spec, source).vectors, first.vectors)
    assert path.read_bytes() == written
    path.unlink()
    assert np.array_equal(known(spec, source).vectors, first.vectors)
    assert path.read_bytes() == written


def test_limit() -> None:
    """By hand: what is cut, then normalised, decides; a quarter more, in two digits."""
    calibration = Calibration(np.array([[0.3, -0.4, 1.2], [0.52, 0, 0]], np.float32))
    assert calibration.limit(None, normalize=False) == calibration.limit(3, normalize=False) == 1.5
    assert calibration.limit(2, normalize=False) == 0.65
    assert calibration.limit(2, normalize=True) == calibration.limit(None, normalize=True) == 1.2
    elsewhere = Calibration(calibration.vectors * np.float32(1 + 1e-6))
    assert elsewhere.limit(2, normalize=False) == 0.65
    zeros = Calibration(np.zeros((2, 3), np.float32))
    assert zeros.limit(None, normalize=True) == 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dimensions", [None, 16, 8])
def test_tiny_model(
    spec: ModelSpec, tmp_path: Path, dimensions: int | None, *, normalize: bool
) -> None:
    """Texts that were not calibrated with keep their direction, and no number is cut off."""
    source = source_of(spec, tmp_path)
    check(source, known(spec, source), dimensions, normalize=normalize)


@pytest.mark.parametrize(
    ("dimensions", "normalize"), [(None, True), (256, True), (64, True), (16, True), (None, False)]
)
def test_demo_model(cache: Path, dimensions: int | None, *, normalize: bool) -> None:
    """The same for a real model, cut to fewer dimensions too."""
    spec = demo_model()
    source = source_of(spec, cache)
    check(source, known(spec, source), dimensions, normalize=normalize)


def check(
    source: Source, calibration: Calibration, dimensions: int | None, *, normalize: bool
) -> None:
    """Compare int8 with floats; shorter ones beside longer ones are coarser."""
    rows = raw(source, [*JUDGEMENT, *CALIBRATION])[:, :dimensions]
    rows = normalized(rows) if normalize else np.ascontiguousarray(rows)
    limit = calibration.limit(dimensions, normalize=normalize)
    assert np.abs(rows).max() < limit
    found = quantized(rows, "int8", limit).astype(np.float32)
    assert np.abs(found).max() > 64
    least = np.vecdot(normalized(found), normalized(rows)).min()
    assert least >= (0.999 if normalize else 0.997)
    if normalize:
        dots = found @ found.T * (limit / 127) ** 2
        assert np.abs(dots - rows @ rows.T).max() < 0.02


def test_fewer_dimensions_have_a_larger_range(spec: ModelSpec, tmp_path: Path) -> None:
    """Vectors of length 1 have larger numbers the fewer they are."""
    calibration = known(spec, source_of(spec, tmp_path))
    limits = [calibration.limit(cut, normalize=True) for cut in (None, 16, 4, 1)]
    assert limits == sorted(set(limits))
    assert limits[-1] == 1.2


def test_what_decides_the_range(tmp_path: Path) -> None:
    """Weights, pooling, tokenizer and limit do; how and in what precision a model runs do not."""
    spec = read_directory(write_model(tmp_path / "m"), "m")

    def path(changed: ModelSpec = spec, **plan: Any) -> Path:
        return source_of(changed, tmp_path, **plan).calibration_path

    first = path()
    assert path(msgspec.structs.replace(spec, id="other")) == first
    assert path(reproducible=True) == path(threads_per_run=2) == first
    assert path(precision=Precision.INT8) == path(precision=Precision.FP16) == first
    others = {
        first,
        path(read_directory(write_model(tmp_path / "w", seed=1), "m")),
        path(read_directory(write_model(tmp_path / "p", pooling="cls_token"), "m")),
        path(msgspec.structs.replace(spec, max_tokens=7)),
        path(read_directory(export(write_model(tmp_path / "e")), "m")),
        path(read_directory(export(write_model(tmp_path / "f", seed=1)), "m")),
    }
    tokenizer = tmp_path / "m" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    others.add(path())
    assert len(others) == 7


def test_eight_bit_weights_have_the_same_range(spec: ModelSpec, tmp_path: Path) -> None:
    """Whichever precision is loaded first decides it, and the others keep within it."""
    reduced = source_of(spec, tmp_path, precision=Precision.INT8)
    exact = source_of(spec, tmp_path)
    first = known(spec, reduced)
    assert np.array_equal(known(spec, exact).vectors, first.vectors)
    check(exact, first, None, normalize=True)


def test_vectors_without_numbers_are_left_out(spec: ModelSpec, tmp_path: Path) -> None:
    """What a reduced precision cannot hold does not decide the range."""
    source = source_of(spec, tmp_path)
    found = known(spec, source, Counted(source.open(Threads()), failing=1))
    assert 0 < len(found.vectors) < 37
    assert 0 < found.limit(None, normalize=True) <= 1.25


@pytest.mark.parametrize(
    ("name", "inputs"), [("static", 37), ("image", 2), ("qwen", 37), ("late", 0), ("sparse", 0)]
)
def test_kinds(tmp_path: Path, name: str, inputs: int) -> None:
    """Kinds with a vector per text or image have a range, of built-in texts or images."""
    write_all(tmp_path)
    spec = read_directory(tmp_path / name, name)
    source = source_of(spec, tmp_path)
    found = calibrated(spec, source, source.open(Threads()))
    assert (found.vectors.shape if found else (0, 0)) == (inputs, spec.dimensions * bool(inputs))
    assert (tmp_path / "calibrations").exists() == bool(inputs)


async def test_loaded_models_have_it(serve: Serve, tmp_path: Path) -> None:
    """Without a warm-up too, and after a restart the same one."""
    limits = []
    for _ in range(2):
        async with serve(cache_dir=tmp_path, warmup_ms=0) as client:
            model = parts_of(client).engine.registry.residents["tiny"].model
            assert model
            assert model.calibration
            limits.append(model.calibration.limit(None, normalize=True))
    assert limits[0] == limits[1] > 0
    assert len(list((tmp_path / "calibrations").iterdir())) == 2
