"""What the autoscalers ask Prometheus for, before Prometheus' own promtool."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import DEPLOY
from tests.deploy.render import documents

KUBERNETES = DEPLOY / "kubernetes"
WAIT = "inference_queue_wait_seconds_bucket"


def questions() -> dict[str, str]:
    """The adapter's and KEDA's queries, for the pods `busy` and `idle` of a namespace."""
    (adapter,) = documents(KUBERNETES / "prometheus-adapter.yaml")
    (scaled,) = documents(KUBERNETES / "components" / "keda" / "scaledobject.yaml")
    asked = {"test:keda": scaled["spec"]["triggers"][0]["metadata"]["query"]}
    for rule in adapter["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        asked[f"test:{rule['name']['as']}"] = query.replace(
            "<<.LabelMatchers>>", 'namespace="n",pod=~"busy|idle"'
        )
    return asked


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """One series of the test."""
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f'{name}{{job="embedding-server",namespace="n",{inside}}}', "values": values}


def sample(name: str, labels: str, value: float) -> dict[str, Any]:
    """What a question is to be answered with."""
    return {"labels": f"{name}{labels}", "value": value}


def test_waits(tmp_path: Path) -> None:
    """The 90th percentile of who waited, and 0, not nothing, where nobody asked for anything."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed")
    rules = [{"record": name, "expr": query} for name, query in questions().items()]
    adapter, gpu = "test:inference_queue_wait_p90_seconds", "test:gpu_utilization_percent"
    answers = {
        adapter: [sample(adapter, '{pod="busy"}', 0.95), sample(adapter, '{pod="idle"}', 0)],
        gpu: [sample(gpu, '{pod="busy"}', 80)],
        "test:keda": [sample("test:keda", "", 0.95)],
    }
    input_series = [
        series(WAIT, "0+0x20", pod="busy", le="0.5"),
        series(WAIT, "0+90x20", pod="busy", le="1"),
        series(WAIT, "0+90x20", pod="busy", le="+Inf"),
        series(WAIT, "7+0x20", pod="idle", le="0.5"),
        series(WAIT, "7+0x20", pod="idle", le="+Inf"),
        series("inference_queue_depth", "3+0x20", pod="busy"),
        series("inference_queue_depth", "0+0x20", pod="idle"),
        series("gpu_utilization_percent", "80+0x20", pod="busy", device="0"),
        series("gpu_utilization_percent", "10+0x20", pod="busy", device="1"),
    ]
    test = {
        "interval": "15s",
        "input_series": input_series,
        "promql_expr_test": [
            {"expr": name, "eval_time": "3m", "exp_samples": samples}
            for name, samples in answers.items()
        ],
    }
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    said = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(said))
    ran = subprocess.run(
        [promtool, "test", "rules", "test.yml"],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
