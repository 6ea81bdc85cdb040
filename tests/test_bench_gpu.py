"""`make bench-gpu` has no mistakes that a card's time would be wasted on."""

import json
from pathlib import Path

import onnxruntime as ort
import pytest
import structlog

from benchmarks import gpu
from benchmarks.gpu_models import batches
from benchmarks.gpu_runs import WAYS


def test_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way runs or says why not, and gives what the first one does."""
    monkeypatch.setattr(structlog, "configure", lambda **_: None)
    monkeypatch.setattr(ort, "set_default_logger_severity", lambda _: None)
    out = tmp_path / "results.json"
    words = ["--dry-run", "--no-parity", "--models", "tiny", "--tokens", "64", "--texts", "8"]
    gpu.main([*words, "--out", str(out)])
    report = json.loads(out.read_bytes())
    assert report["failures"] == []
    assert report["ceiling"]["fp16_flops"] > 0
    over_http = "server, 128 texts in base64"
    assert {row["way"] for row in report["rows"]} == {*WAYS, over_http}
    for row in report["rows"]:
        if row["skipped"]:
            assert "torch" in row["skipped"] or "CUDA graphs" in row["skipped"]
        else:
            assert row["tokens_per_second"] > 0
            assert row["way"] == over_http or row["cosine"] >= 0.999
    assert "natural" in capsys.readouterr().out


def test_out_of_time(tmp_path: Path) -> None:
    """Behind the deadline rows are skipped, and that is said."""
    out = tmp_path / "results.json"
    options = gpu._options(["--dry-run", "--no-parity", "--models", "tiny", "--deadline", "0"])
    options.out = out
    gpu.Bench(options).all(tmp_path)
    assert {row["skipped"] for row in json.loads(out.read_bytes())["rows"]} == {"out of time"}


def test_batches() -> None:
    """Every text is in one batch, none has too many tokens unless it is one text."""
    found = batches([5, 1, 9, 2, 20, 3], 10)
    assert sorted(length for batch in found for length in batch) == [1, 2, 3, 5, 9, 20]
    assert all(sum(batch) <= 10 or len(batch) == 1 for batch in found)
