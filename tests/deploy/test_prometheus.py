"""`deploy/prometheus` against the code, promtool, and a Prometheus that scrapes a real server."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.scrape import prometheus, until
from embedding_server.core import Task
from embedding_server.observability.metrics import Metrics
from tests.process import server
from tests.test_server import DEMO

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
SCENARIOS = sorted(Path(__file__).parent.glob("*.yml"))
TARGET = {"job", "instance"}
"""Labels that a scrape adds."""
FUNCTIONS = {
    "absent", "and", "avg", "avg_over_time", "by", "changes", "clamp_max", "clamp_min", "count",
    "histogram_quantile", "increase", "max", "max_over_time", "min", "on", "or", "rate", "sum",
    "time", "topk", "unless", "vector",
}  # fmt: skip
TRACE = "0af7651916cd43dd8448eb211c80319c"


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of a file."""
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS, RECORDED = rules("alerts.yml"), rules("recording.yml")


def series() -> dict[str, set[str]]:
    """Every series that exists, with its labels: ours, the process's and those of the rules."""
    metrics = Metrics("test")
    found = {"up": TARGET, "ALERTS": TARGET | {"alertname", "alertstate"}}
    for instrument in vars(metrics).values():
        if hasattr(instrument, "_labelnames"):
            (family,) = instrument.describe()
            labels = {*instrument._labelnames} | TARGET
            ends = {"counter": ["_total"], "histogram": ["_sum", "_count"]}.get(family.type, [""])
            found |= {family.name + end: labels for end in ends}
            if family.type == "histogram":
                found[f"{family.name}_bucket"] = labels | {"le"}
    for family in metrics.registry.collect():
        if family.name.startswith("process_"):
            found[family.name + "_total" * (family.type == "counter")] = TARGET
    return found | {rule["record"]: TARGET | {"model"} for rule in RECORDED}


SERIES = series()


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression below `deploy`, with its file."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict) and node.get("type") != "datasource":
            said = (node[key] for key in ("expr", "query") if isinstance(node.get(key), str))
            yield from (re.sub(r"label_values\((.*), \w+\)", r"\1", text) for text in said)
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                yield from walk(child)

    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.suffix in (".yml", ".yaml", ".json"):
            for document in yaml.safe_load_all(path.read_text()):
                for text in walk(document or {}):
                    yield path.name, text


def unknown(expression: str) -> set[str]:
    """What an expression names that does not exist: metrics, and labels that none of them has."""
    text = re.sub(r"\[[^\]]*\]", "", re.sub(r'"[^"]*"', '""', expression))
    grouped = r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)"
    labels = {one.strip() for group in re.findall(grouped, text) for one in group.split(",")}
    text = re.sub(grouped, "", text)
    matched = re.findall(r"([\w:]+)\s*\{([^}]*)\}", text)
    text = re.sub(r"\{[^}]*\}", "", text)
    names = set(re.findall(r"(?<![\w:.])[A-Za-z_][\w:]*", text)) - FUNCTIONS
    wrong = names - SERIES.keys()
    for name, matchers in matched:
        wrong |= set(re.findall(r"(\w+)\s*[=!]", matchers)) - SERIES.get(name, set())
    return wrong | (labels - set[str]().union(*(SERIES.get(name, set()) for name in names)))


@pytest.mark.parametrize(("file", "expression"), list(expressions()))
def test_expressions_name_what_exists(file: str, expression: str) -> None:
    """Every metric and every label of a rule or dashboard exists in the code."""
    assert not unknown(expression), file


def test_unknown_names_are_found() -> None:
    """The comparison sees a metric, a matched label and a grouping label that do not exist."""
    assert unknown('rate(inference_rejected_total{reason="x"}[5m])') >= {"inference_rejected_total"}
    assert unknown('inference_rejections_total{why="x"} > 1') == {"why"}
    assert unknown("sum by (job, model) (rate(inference_rejections_total[5m]))") == {"model"}
    assert not unknown('sum by (job) (rate(inference_rejections_total{reason!="x"}[5m])) > 2.5')


def test_alerts_are_explained() -> None:
    """Every alert has a severity, a summary, a description and its part of the operations page."""
    page = (ROOT / "deploy" / "README.md").read_text()
    explained = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert explained == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        notes = alert["annotations"]
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert notes["summary"]
        assert notes["description"]
        assert notes["runbook"] == f"deploy/README.md#{alert['alert'].lower()}"


def test_every_alert_has_a_scenario() -> None:
    """In some scenario it fires; in the healthy one, which has all that it needs, nothing does."""
    texts = [path.read_text() for path in SCENARIOS]
    fired = {name for text in texts for name in re.findall(r'\{alertname="(\w+)"', text)}
    assert fired == {alert["alert"] for alert in ALERTS}
    healthy = yaml.safe_load(texts[0])["tests"][0]
    assert healthy["name"].startswith("healthy")
    given = {one["series"].partition("{")[0] for one in healthy["input_series"]}
    needed = {
        name
        for rule in ALERTS + RECORDED
        for name in re.findall(r"\b(?:inference|gpu)_\w+", re.sub(r"\w*:[\w:]*", "", rule["expr"]))
    }
    assert needed <= given


def promtool(*arguments: str) -> str:
    """What promtool says; it must not fail."""
    ran = subprocess.run(
        ["promtool", *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.full
def test_rules_are_valid() -> None:
    """`promtool check rules` and `check config` pass."""
    for file in ("recording.yml", "alerts.yml"):
        assert "SUCCESS" in promtool(
            "check", "rules", "--lint=all", "--lint-fatal", str(PROMETHEUS / file)
        )
    assert "is valid" in promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@pytest.mark.full
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenarios(path: Path) -> None:
    """`promtool test rules`: in each situation exactly the alerts fire that should."""
    assert "SUCCESS" in promtool("test", "rules", str(path))


def warned(text: str) -> set[str]:
    """Metrics of an exposition that `promtool check metrics` warns about; 3 is its status then."""
    ran = subprocess.run(
        ["promtool", "check", "metrics"],
        check=False,
        input=text,
        capture_output=True,
        text=True,
    )
    assert ran.returncode in (0, 3), ran.stderr
    return {line.split()[0] for line in (ran.stdout + ran.stderr).splitlines()}


def exposed() -> str:
    """An exposition in which every instrument has a sample."""
    metrics = Metrics("test")
    for instrument in vars(metrics).values():
        if getattr(instrument, "_labelnames", ()):
            instrument.labels(*instrument._labelnames)
    metrics.record_request(Task.EMBED, "m", "success", 1, 0.1)
    return metrics.render("")[0].decode()


@pytest.mark.full
def test_metrics_are_as_prometheus_likes_them() -> None:
    """`promtool check metrics` has no warning, kept names included, whatever is shown."""
    assert not warned(exposed())


@pytest.mark.full
def test_prometheus_scrapes_a_server(tmp_path: Path) -> None:
    """Our series, rules and exemplars arrive, and promtool likes what the server shows."""
    with server("--demo", INFERENCE_API_KEYS="secret") as demo:
        demo.until("/health/ready")
        address = str(demo.base_url).removeprefix("http://").rstrip("/")
        headers = {
            "Authorization": "Bearer secret",
            "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        }
        body = {"model": DEMO, "text": "Hello"}
        for _ in range(3):
            assert demo.post("/api/embed", json=body, headers=headers).is_success
        with prometheus(tmp_path, {address: address}, "200ms") as client:
            (up,) = until(client, "query", query='up{job="embedding-server"} == 1')
            assert up["metric"]["instance"] == address
            query = f'inference_embed_requests_total{{model="{DEMO}", status="success"}}'
            (found,) = until(client, "query", query=query)
            assert found["value"][1] == "3"
            (found,) = until(client, "query", query="sum(inference_requests_by_key_total)")
            assert found["value"][1] == "3"
            (found,) = until(client, "query", query="instance:inference_queue_fill:ratio")
            assert found["value"][1] == "0"
            for name in ("http_requests_duration_seconds", "queue_wait_seconds", "run_seconds"):
                query = f"inference_{name}_bucket"
                around = {"start": str(time.time() - 300), "end": str(time.time() + 300)}
                (kept, *_) = until(client, "query_exemplars", query=query, **around)
                assert kept["exemplars"][0]["labels"] == {"trace_id": TRACE}
            targets = until(client, "targets")
            assert targets["activeTargets"][0]["lastError"] == ""
        text = demo.get("/metrics").text
        assert "secret" not in text
        assert not warned(text)
