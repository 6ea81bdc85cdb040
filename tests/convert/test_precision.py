"""Weights in half precision, under old names, in shards: what a checkpoint may look like."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedding_server.catalog.local import read_directory
from embedding_server.convert import ConvertError, convert, stored_precision
from embedding_server.convert import graph as graphs
from embedding_server.convert.checkpoint import Checkpoint, weight_files
from embedding_server.core import Precision, normalized
from embedding_server.runtime.session import OnnxSession, Threads
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.source import Source
from tests.convert.test_families import GOLDENS, Golden, inputs, run
from tests.fakes import ids
from tests.tiny import write_model

DTYPES = {Precision.FP16: np.float16, Precision.BF16: ml_dtypes.bfloat16}


def stored_in(directory: Path, precision: Precision) -> Path:
    """The tiny model with weights of that type."""
    write_model(directory)
    file = directory / "model.safetensors"
    save_file(
        {name: value.astype(DTYPES[precision]) for name, value in load_file(file).items()}, file
    )
    return directory


@pytest.mark.parametrize("precision", DTYPES)
def test_half_precision(tmp_path: Path, precision: Precision) -> None:
    """Rounding float32 weights is the same as having them so, near to fp32, and said so."""
    whole = read_directory(write_model(tmp_path / "whole"), "m")
    half = read_directory(stored_in(tmp_path / "half", precision), "m")
    texts = [ids(20, 4), ids(3, 9)]
    rounded = Source(whole, RunPlan(cache=tmp_path, precision=precision), 1)
    assert rounded.precision is precision
    stored = Source(half, RunPlan(cache=tmp_path, precision=precision), 1)
    assert (stored.precision, stored_precision(half.directory)) == (Precision.FP32, precision)
    ours, same = (normalized(one.open(Threads()).run(texts)) for one in (rounded, stored))
    assert np.array_equal(ours, same)
    exact = normalized(OnnxSession(convert(whole, tmp_path), 1).run(texts))
    assert not np.array_equal(ours, exact)
    assert np.vecdot(ours, exact).min() > 0.999


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_every_family_in_half_precision(file: Path, tmp_path: Path, precision: Precision) -> None:
    """Weights rounded to half precision give nearly the same, whatever the family."""
    golden = Golden(file)
    graph = golden.convert(tmp_path, rounded=precision)
    found, expected = run(golden, graph, inputs(golden.kind)), golden.values
    if expected.shape[1] > 3:
        assert np.vecdot(normalized(found), normalized(expected)).min() >= 0.999
    else:
        assert np.abs(found - expected).max() <= 0.05 * max(1.0, np.abs(expected).max())


def test_old_names(tmp_path: Path) -> None:
    """Checkpoints that came from TensorFlow call norms' numbers gamma and beta."""
    model = write_model(tmp_path / "m")
    expected = OnnxSession(convert(read_directory(model, "m"), tmp_path), 1).run([ids(9)])
    tensors = load_file(model / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {
            key.removesuffix(new) + name if key.endswith(new) else key: value
            for key, value in tensors.items()
        }
    assert any(name.endswith("gamma") for name in tensors)
    save_file(tensors, model / "model.safetensors")
    found = OnnxSession(convert(read_directory(model, "m"), tmp_path), 1).run([ids(9)])
    assert np.array_equal(found, expected)


def test_rows(tmp_path: Path) -> None:
    """Rows are read without the rest; one that is not there is an error."""
    directory = stored_in(tmp_path, Precision.BF16)
    with Checkpoint(directory) as weights:
        name = next(name for name in weights if "word_embeddings" in name)
        whole, rows = weights(name), weights.rows(name, 3, 5)
        assert np.array_equal(rows, whole[3:5])
        assert rows.dtype == whole.dtype == np.dtype(np.float32)
        with pytest.raises(ConvertError, match=r"model\.safetensors"):
            weights.rows(name, len(whole), len(whole) + 1)


def test_tensors_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What several threads write in parts is what one writes in one piece, to the last byte."""
    directory = stored_in(tmp_path / "model", Precision.BF16)
    spec, written = read_directory(directory, "m"), []
    for size, name in ((1 << 23, "whole"), (1000, "parts")):
        monkeypatch.setattr(graphs, "_PART_BYTES", size)
        path = convert(spec, tmp_path / name)
        written.append((path.parent / f"{path.name}_data").read_bytes())
    whole, parts = written
    assert len(whole) > 50_000
    assert parts == whole


def test_odd_indexes(tmp_path: Path) -> None:
    """An index that is none, or leads elsewhere, is named."""
    index = tmp_path / "model.safetensors.index.json"
    for content, said in (
        ("[", "index.json"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors, which is not"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "which is not beside it"),
    ):
        index.write_text(content)
        with pytest.raises(ConvertError, match=said):
            weight_files(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0[1, 2, 3")
    with pytest.raises(ConvertError, match=r"model\.safetensors"):
        stored_precision(tmp_path)
    with pytest.raises(ConvertError, match=r"model\.safetensors"), Checkpoint(tmp_path):
        pass
