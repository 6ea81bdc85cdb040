"""`embedding-server models` and `fetch` as users run them."""

import json
import subprocess
import sys
from pathlib import Path

from tests.hub import LocalHub
from tests.process import environment

COMMAND = [sys.executable, "-m", "embedding_server"]


def run(*words: str, offline: str = "1", **env: str) -> "subprocess.CompletedProcess[str]":
    """One verb with its flags."""
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE=offline, **env),
        check=False,
        timeout=60,
    )


def test_models_table(models: Path, tmp_path: Path) -> None:
    """A line per model, own ones included, with what is known of it."""
    ran = run("models", "--model-path", str(models), HF_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()
    assert head.split() == [
        "id",
        "kind",
        "dims",
        "tokens",
        "MB",
        "source",
        "license",
        "cached",
        "converted",
        "allowed",
    ]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["Xenova/bge-small-en-v1.5"][1:4] == ["dense", "384", "512"]
    assert rows["Xenova/bge-small-en-v1.5"][-3:] == ["no", "-", "yes"]
    assert rows["tiny"][-5:] == [str(models / "tiny"), "-", "yes", "-", "yes"]
    assert rows["Qdrant/bm25"][1] == "sparse"
    assert rows["Qdrant/bm25"][-1] == "yes"


def test_models_as_json(tmp_path: Path) -> None:
    """The same as JSON, with the allow-list applied."""
    ran = run(
        "models", "--json", "--allowed-embedding-models", "BAAI/bge-m3", HF_HOME=str(tmp_path)
    )
    rows = json.loads(ran.stdout)
    assert [row["id"] for row in rows if row["allowed"]] == ["BAAI/bge-m3"]
    (bge,) = (row for row in rows if row["id"] == "BAAI/bge-m3")
    assert (bge["dimensions"], bge["max_tokens"], bge["cached"]) == (1024, 8192, False)


def test_models_shows_configured_names(models: Path, tmp_path: Path) -> None:
    """The keys of a YAML file are listed, names and models of their own, and only they allowed."""
    config = tmp_path / "models.yaml"
    config.write_text("models: {name: {name: tiny}, mine: {name: other, dimensions: 8}}")
    words = ("models", "--json", "--model-path", str(models))
    for said in ({"INFERENCE_MODEL_CONFIG": str(config)}, {}):
        flags = () if said else ("--model-config", str(config))
        ran = run(*words, *flags, HF_HOME=str(tmp_path), **said)
        allowed = {row["id"]: row for row in json.loads(ran.stdout) if row["allowed"]}
        assert set(allowed) == {"name", "tiny", "mine"}
        assert allowed["mine"]["dimensions"] == 8


def test_fetch_mistakes_are_one_line(tmp_path: Path) -> None:
    """An unknown name, nothing to do, and offline without a cache are one line each."""
    for words, said in (
        (["bge-m4"], "'bge-m4' is not known; did you mean BAAI/bge-m3"),
        (["BAAI/bge-m4"], "HF_HUB_OFFLINE is set"),
        (["BAAI/bge-m4"], "; did you mean BAAI/bge-m3"),
        ([], "name models, or say --allowed"),
        (["BAAI/bge-m3"], "HF_HUB_OFFLINE is set"),
    ):
        ran = run("fetch", *words, HF_HOME=str(tmp_path))
        assert ran.returncode in {1, 2}
        assert said in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1


def test_foreign_directories_are_said_on_stderr(tmp_path: Path) -> None:
    """What is printed for programs stays JSON, whatever lies in the model directory."""
    (tmp_path / "lost+found").mkdir()
    ran = run("models", "--json", "--model-path", str(tmp_path), HF_HOME=str(tmp_path))
    assert len(json.loads(ran.stdout)) > 50
    assert ran.stderr.count("model.unusable") == 1


def test_fetch(tmp_path: Path) -> None:
    """Models are downloaded by name or allow-list, once; damaged files are found and mended."""
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "onnx/model.onnx": b"graph"}
    env = {"HF_HOME": str(tmp_path), "offline": "0"}
    with LocalHub() as hub:
        for name in ("Xenova/bge-small-en-v1.5", "Xenova/bge-base-en-v1.5"):
            hub.publish(name, files, lfs=("onnx/model.onnx",))
        env["HF_ENDPOINT"] = hub.url
        allowed = ("--allowed", "--allowed-embedding-models", "Xenova/bge-base-en-v1.5")
        ran = run("fetch", "Xenova/bge-small-en-v1.5", *allowed, **env)
        assert ran.returncode == 0, ran.stderr
        paths = [Path(line.partition(": ")[2]) for line in ran.stdout.splitlines()]
        assert [(path / "onnx/model.onnx").read_bytes() for path in paths] == [b"graph"] * 2
        count = len(hub.requests)
        again = run("fetch", "Xenova/bge-small-en-v1.5", **env)
        assert (again.returncode, len(hub.requests)) == (0, count)
        (paths[0] / "onnx/model.onnx").resolve().write_bytes(b"grapy")
        mended = run("fetch", "--verify", "Xenova/bge-small-en-v1.5", **env)
        assert "fetched onnx/model.onnx again" in mended.stdout, mended.stderr
        assert (paths[0] / "onnx/model.onnx").read_bytes() == b"graph"
