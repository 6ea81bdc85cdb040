"""`make bench-gpu`, so that a card's time is not wasted on mistakes."""

import json
import subprocess
import sys
from pathlib import Path

_WAYS = ["ours", "bare", "bound", "captured", "joined"]
_WORDS = ["--no-http", "--models", "MiniLM-L6", "--tokens", "1024"]
_WORDS += ["--texts", "40", "--seconds", "0", "--ways", *_WAYS]


def test_bench(card: str, tmp_path: Path) -> None:
    """Graphs of all families run on CUDA, and so does every way of ours."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.gpu", *_WORDS, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads(out.read_bytes())
    assert report["failures"] == []
    wanted = {"ok"} if card == "cuda" else {"ok", "OFF"}
    assert {family[""] for family in report["parity"].values()} <= wanted
    assert {row["skipped"] for row in report["rows"]} == {""}
    ways = {row["way"] for row in report["rows"]}
    assert all(any(way in one for one in ways) for way in _WAYS)
