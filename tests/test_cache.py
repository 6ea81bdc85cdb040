"""`embedding-server cache` as users run it."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.profile import store
from embedding_server.serving.references import store as store_reference
from embedding_server.serving.source import Source
from tests.test_conversion import run
from tests.tiny import add_dense, write_model


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A cache with two models' graphs, and all that is measured of one."""
    cache = tmp_path / "cache"
    one = read_directory(write_model(tmp_path / "one", hidden=256), "one")
    directory = write_model(tmp_path / "two", seed=1)
    add_dense(directory, 8)
    other = read_directory(directory, "two")
    source = Source(one, RunPlan(cache=cache), 1)
    store(source.profile(), source.profile_path)
    assert source.reference_path
    store_reference([np.zeros(3, np.float32)], source.reference_path)
    store_reference([np.zeros((2, 3), np.float32)], source.calibration_path)
    Source(other, RunPlan(cache=cache), 1)
    (cache / "graphs" / ".building-abc").mkdir()
    (cache / "graphs" / "mine").mkdir()
    (cache / "engines" / ("0" * 32)).mkdir(parents=True)
    (cache / "notes.txt").write_text("mine")
    return cache


def listed(cache: Path) -> dict[str, list[str]]:
    """Name -> the other columns."""
    ran = run("cache", "ls", "--cache-dir", cache)
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()
    assert head.split() == ["name", "kind", "MB", "made", "model", "architecture"]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_ls(filled: Path, tmp_path: Path) -> None:
    """Everything is shown with its kind, size, time and model; what is not ours is not."""
    rows = listed(filled)
    by_kind = {kind: [row for row in rows.values() if row[0] == kind] for kind in ("graph", "hash")}
    assert sorted(row[4:] for row in by_kind["graph"]) == [
        ["one", "BertModel", "fp32"],
        ["two", "BertModel", "fp32"],
    ]
    assert str(tmp_path / "one" / "model.safetensors") in [row[4] for row in by_kind["hash"]]
    others = {row[0]: row for name, row in rows.items() if row[0] not in by_kind}
    assert others["profile"][4] == "one"
    assert others["projections"][4] == str(tmp_path / "two")
    assert set(others) == {
        "calibration",
        "engine",
        "profile",
        "projections",
        "reference",
        "unfinished",
    }
    assert not [name for name in rows if "mine" in name or "notes" in name]


def test_rm_by_name_and_model(filled: Path) -> None:
    """A model's entries go together, links to its weights free nothing, the rest stays."""
    before = listed(filled)
    ran = run("cache", "rm", "one", "graphs/.building-abc", "--cache-dir", filled)
    assert ran.returncode == 0, ran.stderr
    *removed, freed = ran.stdout.splitlines()
    assert {line.removeprefix("removed ") for line in removed} == set(before) - set(listed(filled))
    assert len(removed) == 3
    assert 0 <= float(freed.removeprefix("freed ").removesuffix(" MB")) < 1
    assert "two" in [row[4] for row in listed(filled).values()]


def test_rm_old(filled: Path) -> None:
    """Age is that of the entry."""
    (reference,) = filled.glob("references/*")
    long_ago = time.time() - 10 * 86_400
    os.utime(reference, (long_ago, long_ago))
    ran = run("cache", "rm", "--older-than", "9.5", "--cache-dir", filled)
    assert ran.stdout.splitlines()[:-1] == [f"removed references/{reference.name}"]
    assert not reference.exists()


def test_rm_all_stays_inside(filled: Path, tmp_path: Path) -> None:
    """Foreign files, models, and what links lead to are left alone."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (kept := elsewhere / f"{'a' * 32}.json").write_text("{}")
    (filled / "graphs" / ("b" * 32)).symlink_to(elsewhere)
    for path in filled.glob("hashes/*"):
        path.unlink()
    (filled / "hashes").rmdir()
    (filled / "hashes").symlink_to(elsewhere)
    assert run("cache", "rm", "--all", "--cache-dir", filled).returncode == 0
    assert listed(filled) == {}
    assert kept.exists()
    assert (filled / "graphs" / "mine").is_dir()
    assert (filled / "notes.txt").exists()
    assert (tmp_path / "one" / "model.safetensors").stat().st_nlink == 1
    assert not list(filled.glob("graphs/.*"))


def test_an_empty_cache(tmp_path: Path) -> None:
    """There may be none yet."""
    assert listed(tmp_path / "none") == {}
    ran = run("cache", "rm", "--all", "--cache-dir", tmp_path / "none")
    assert ran.stdout == "freed 0.0 MB\n"


def test_mistakes_are_one_line(filled: Path) -> None:
    """Nothing is removed unless what is meant is clear."""
    for words, said in (
        ((), "or say --all"),
        (("one", "--all"), "or say --all"),
        (("--all", "--older-than", "1"), "or say --all"),
        (("one", "three"), "shows no three"),
        (("../one",), "shows no ../one"),
        (("-",), "shows no -"),
    ):
        ran = run("cache", "rm", *words, "--cache-dir", filled)
        assert ran.returncode == 1
        assert said in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1
    assert "one" in [row[4] for row in listed(filled).values()]
