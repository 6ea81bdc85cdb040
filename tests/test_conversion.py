"""`embedding-server convert` as users run it."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.core import Overrides, Pooling, Precision
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.session import Threads
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.source import Source
from tests.convert.test_families import FAMILIES, Golden
from tests.process import environment
from tests.tiny import add_dense, export, write_model

COMMAND = [sys.executable, "-m", "embedding_server"]
LAYERS = FAMILIES.parent / "layers"


def run(*words: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """One verb with its flags."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", **env),
        check=False,
        timeout=60,
    )


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache of its own."""
    return f"--cache-dir={tmp_path / 'cache'}"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_convert(tmp_path: Path, cache: str, precision: str) -> None:
    """A directory's graph is where serving looks for it, and says what it was made of."""
    model = write_model(tmp_path / "m")
    ran = run("convert", model, cache, "--precision", precision)
    assert ran.returncode == 0, ran.stderr
    found = re.fullmatch(r"m: (\S+/model\.onnx), \d+\.\d s, \d+\.\d MB\n", ran.stdout)
    assert found
    graph = Path(found[1])
    origin = json.loads((graph.parent / "origin.json").read_bytes())
    assert origin["model"] == "m"
    assert origin["directory"] == str(model)
    assert (origin["architecture"], origin["precision"]) == ("BertModel", precision)
    made = graph.stat().st_mtime_ns
    assert run("convert", model, cache, "--precision", precision).stdout.startswith(f"m: {graph},")
    assert graph.stat().st_mtime_ns == made
    assert len(list(tmp_path.glob("cache/graphs/*"))) == 1
    rows = json.loads(run("models", "--json", "--model-path", tmp_path, cache).stdout)
    shown = {row["id"]: row["converted"] for row in rows}
    assert shown["m"] == origin["converted"]
    assert shown["BAAI/bge-m3"] is None


def test_by_id(models: Path, cache: str) -> None:
    """What the catalogue knows is converted by its name."""
    ran = run("convert", "tiny", "--model-path", models, cache)
    assert ran.stdout.startswith("tiny: "), ran.stderr


def test_progress_bar(tmp_path: Path, cache: str) -> None:
    """A terminal shows a bar and no log; pipes get neither."""
    words = ["convert", str(write_model(tmp_path / "m")), cache]
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    subprocess.run([*COMMAND, *words], stderr=stderr, check=True, stdout=subprocess.PIPE)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "m: 100%|" in shown
    assert "graph.built" not in shown
    assert "%|" not in run(*words).stderr


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_out_stands_alone(tmp_path: Path, cache: str, precision: str) -> None:
    """What `--out` leaves serves the same vectors when model and cache are gone."""
    model = write_model(tmp_path / "m", hidden=256)  # weights large enough to be links
    add_dense(model, 8, inputs=256)
    words = ("convert", model, cache, "--precision", precision, "--out", tmp_path / "new" / "out")
    ran = run(*words)
    assert ran.returncode == 0, ran.stderr
    texts = [np.array([2, 9, 11, 3]), np.array([2, 5, 3])]
    plan = RunPlan(cache=tmp_path / "cache", precision=Precision(precision))
    expected = Source(read_directory(model, "m"), plan, 1).open(Threads()).run(texts)
    for path in (model, tmp_path / "cache"):
        path.rename(path.with_name(f"{path.name}-gone"))
    spec = read_directory(tmp_path / "new" / "out", "m")
    source = Source(spec, RunPlan(cache=tmp_path / "other"), 1)
    assert source.converted is None
    vectors = source.open(Threads()).run(texts)
    assert np.shape(vectors) == (2, 8)
    assert np.array_equal(vectors, expected)
    other = msgspec.structs.replace(spec, overrides=Overrides(pooling=Pooling.CLS))
    with pytest.raises(SessionError, match="made for one pooling"):
        Source(other, RunPlan(cache=tmp_path / "other"), 1).open(Threads())
    before = source.fingerprint("cpu")
    (tmp_path / "new" / "out" / "weights-0").unlink()
    changed = Source(spec, RunPlan(cache=tmp_path / "other"), 1).fingerprint("cpu")
    assert changed != before
    assert "not empty" in run(*words).stderr


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_compare(tmp_path: Path, cache: str, name: str) -> None:
    """Every layer agrees with transformers; one that does not is seen, and is the exit status."""
    file, model = LAYERS / f"{name}.npz", tmp_path / "m"
    tokenizer = (write_model(tmp_path / "t") / "tokenizer.json").read_bytes()
    Golden(FAMILIES / f"{name}.npz").write(model)
    (model / "tokenizer.json").write_bytes(tokenizer)
    ran = run("convert", model, cache, "--compare", file)
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()[1:]
    assert head.split() == ["layer", "max", "abs", "difference", "cosine"]
    with np.load(file) as archive:
        stored = dict(archive)
    assert [line.split()[0] for line in lines] == [one for one in stored if one != "ids"]
    assert all(float(line.split()[1]) < 1e-4 for line in lines)
    assert not list(tmp_path.glob("cache/graphs/.*"))
    stored["layer_1"][3] *= -1
    np.savez(tmp_path / "wrong.npz", **stored)
    ran = run("convert", model, cache, "--compare", tmp_path / "wrong.npz")
    assert ran.returncode == 1
    assert [line.split()[2] for line in ran.stdout.splitlines()[3:5]] == ["-1.000000", "1.000000"]


def test_mistakes_are_one_line(tmp_path: Path, cache: str) -> None:
    """What cannot be converted, put or compared is said in a line."""
    model, full = write_model(tmp_path / "m"), write_model(tmp_path / "full")
    exported = export(write_model(tmp_path / "exported"))
    np.savez(tmp_path / "no.npz", layer_0=np.zeros((3, 32)))
    np.savez(tmp_path / "deep.npz", ids=[2, 3], layer_7=np.zeros((2, 32)))
    np.savez(tmp_path / "wide.npz", ids=[2, 3], layer_0=np.zeros((2, 64)))
    np.savez(tmp_path / "id.npz", ids=[2, 9999], layer_0=np.zeros((2, 32)))
    for words, said in (
        ((tmp_path / "nothing",), "is not known"),
        ((tmp_path,), "config.json"),
        ((exported,), "there is nothing to convert, it has onnx/model.onnx"),
        ((exported, "--precision", "int8"), "is an exported graph"),
        (("Xenova/bge-small-en-v1.5",), "HF_HUB_OFFLINE is set"),
        ((model, "--out", full), "it is there and not empty"),
        ((model, "--out", model / "config.json"), "it is there and not empty"),
        ((model, "--out", model / "config.json" / "out"), "File exists"),
        ((model, "--compare", tmp_path / "none.npz"), "no npz file"),
        ((model, "--compare", model / "config.json"), "no npz file"),
        ((model, "--compare", tmp_path / "no.npz"), "it must have ids"),
        ((model, "--compare", tmp_path / "deep.npz"), "layer_7 is not in the model, which has 3"),
        ((model, "--compare", tmp_path / "wide.npz"), "layer_0 has shape (2, 64), the model's (2,"),
        ((model, "--compare", tmp_path / "id.npz"), "indices element out of data bounds"),
    ):
        ran = run("convert", *words, cache, HF_HOME=str(tmp_path / "hub"))
        assert ran.returncode in {1, 2}, words
        lines = [line for line in ran.stderr.splitlines() if "graph.built" not in line]
        assert said in ran.stderr, words
        assert len(lines) == 1, lines
