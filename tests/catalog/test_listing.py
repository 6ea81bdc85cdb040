"""`embedding-server models` and `fetch` as users run them."""

import json
import subprocess
import sys
from pathlib import Path

from tests.process import environment

COMMAND = [sys.executable, "-m", "embedding_server"]


def run(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """One verb with its flags."""
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", **env),
        check=False,
        timeout=60,
    )


def test_models_table(models: Path, tmp_path: Path) -> None:
    """A line per model, own ones included, with what is known of it."""
    ran = run("models", "--model-path", str(models), HF_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()
    assert head.split() == ["id", "kind", "dims", "tokens", "MB", "source", "cached", "allowed"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["Xenova/bge-small-en-v1.5"][1:4] == ["dense", "384", "512"]
    assert rows["Xenova/bge-small-en-v1.5"][-2:] == ["no", "yes"]
    assert rows["tiny"][-3:] == [str(models / "tiny"), "yes", "yes"]
    assert rows["Qdrant/bm25"][1] == "sparse"
    assert rows["Qdrant/bm25"][-1] == "no"


def test_models_as_json(tmp_path: Path) -> None:
    """The same as JSON, with the allow-list applied."""
    ran = run(
        "models", "--json", "--allowed-embedding-models", "BAAI/bge-m3", HF_HOME=str(tmp_path)
    )
    rows = json.loads(ran.stdout)
    assert [row["id"] for row in rows if row["allowed"]] == ["BAAI/bge-m3"]
    (bge,) = (row for row in rows if row["id"] == "BAAI/bge-m3")
    assert (bge["dimensions"], bge["max_tokens"], bge["cached"]) == (1024, 8192, False)


def test_fetch_mistakes_are_one_line(tmp_path: Path) -> None:
    """An unknown name, nothing to do, and offline without a cache are one line each."""
    for words, said in (
        (["BAAI/bge-m4"], "'BAAI/bge-m4' is not known; did you mean BAAI/bge-m3"),
        ([], "name models, or say --allowed"),
        (["BAAI/bge-m3"], "BAAI/bge-m3"),
    ):
        ran = run("fetch", *words, HF_HOME=str(tmp_path))
        assert ran.returncode in {1, 2}
        assert said in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1
