"""`deploy/grafana` against panels.yml, the alerts, the code and a Prometheus that scrapes a server.

No Grafana is there to draw it.
"""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from benchmarks.scrape import as_asked, prometheus, until
from deploy.dashboards import files, subject
from deploy.panels import GRAFANA, Panel, limits, pages, shown
from embedding_server.observability.metrics import Metrics
from embedding_server.settings import Settings
from tests.deploy import DEPLOY
from tests.process import Server, server
from tests.test_server import DEMO

DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in GRAFANA.glob("*.json")}
PANELS = [(name, panel) for name, one in DASHBOARDS.items() for panel in one["panels"]]
NOT_SHOWN = {"inference_certificate_expiry_timestamp_seconds": "an alert says in time"}
AGAIN = "run `python -m deploy.dashboards`"
RULES = DEPLOY / "prometheus"


def test_json_is_what_the_table_says() -> None:
    """Every file is what deploy/dashboards.py makes of panels.yml and the alerts, and no more."""
    assert {path: path.read_text() for path in GRAFANA.glob("*.json")} == files(), AGAIN
    assert DASHBOARDS.keys() == {"service", "queue", "batches", "models", "gpu"}


def test_places() -> None:
    """Panels lie within 24 columns, beside each other, and never on one another."""
    for name, one in DASHBOARDS.items():
        cells = [
            (x, y)
            for at in (panel["gridPos"] for panel in one["panels"])
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]
        assert len(cells) == len(set(cells)), name
        assert max(x for x, _ in cells) == 23, name


def test_names() -> None:
    """Dashboards, panels and queries can be told apart, and every panel says what it is about."""
    assert len({one["uid"] for one in DASHBOARDS.values()}) == len(DASHBOARDS)
    for one in DASHBOARDS.values():
        for key in ("id", "title"):
            assert len({panel[key] for panel in one["panels"]}) == len(one["panels"])
    for name, panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert letters, (name, panel["title"])
        assert len({*letters}) == len({*legends}) == len(letters)
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_filters() -> None:
    """Every query asks for the job; one that can be narrowed to instances or models is."""
    for name, panel in PANELS:
        for target in panel["targets"]:
            series = re.findall(r"([\w:]+)\{([^}]*)\}", target["expr"])
            assert series, (name, panel["title"])
            for metric, matchers in series:
                assert 'job="$job"' in matchers
                if metric.startswith("job:") or metric == "ALERTS":
                    assert "$instance" not in matchers
                elif not metric.startswith("job_model:"):
                    assert 'instance=~"$instance"' in matchers
                assert ('model=~"$model"' in matchers) == ("model" in labels(metric))


def labels(metric: str) -> set[str]:
    """The labels of a metric or of a rule's result, as far as filters care."""
    if ":" in metric:
        return {*metric.partition(":")[0].split("_")}
    family = re.sub(r"_(total|bucket|sum|count)$", "", metric)
    for one in vars(Metrics("test")).values():
        if hasattr(one, "_labelnames") and one.describe()[0].name in (metric, family):
            return {*one._labelnames}
    return set()


def test_all_that_is_measured_is_shown() -> None:
    """Every instrument is on a dashboard, or in an alert alone for a reason; so is every rule."""
    asked = " ".join(target["expr"] for _, panel in PANELS for target in panel["targets"])
    rules = "".join((RULES / name).read_text() for name in ("recording.yml", "alerts.yml"))
    instruments = [one for one in vars(Metrics("test")).values() if hasattr(one, "_labelnames")]
    names = {one.describe()[0].name for one in instruments}
    absent = {name for name in names if not re.search(rf"\b{name}(_\w+)?\b", asked)}
    assert absent == NOT_SHOWN.keys()
    assert all(name in rules for name in NOT_SHOWN)
    recorded = set(re.findall(r"record: (\S+)", rules))
    assert {one for one in recorded if one not in asked and not one.startswith("job:")} == set()


def test_lines_are_those_of_the_alerts() -> None:
    """What an alert compares has its line there, in the colour of its severity."""
    lines = {}
    for name, panel in PANELS:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        lines[name, panel["title"]] = {step["value"]: step["color"] for step in steps}
    assert lines["queue", "Fill of the line"] == {None: "green", 0.5: "orange"}
    assert lines["queue", "Wait, of what was predicted"] == {
        None: "orange", 0.5: "green", 1.5: "orange",
    }  # fmt: skip
    assert lines["service", "Errors"] == {
        None: "green", 0.001: "orange", 0.006: "red", 0.0144: "red",
    }  # fmt: skip
    drawn = {one.alert for page in pages() for panel in page.panels for one in shown(panel)}
    assert {one.alert for one in limits()} - drawn == {"InferenceCertificateExpires"}
    for page in pages():
        for panel in page.panels:
            for one in shown(panel):
                assert one.right == 0 or one.right in lines[page.name, panel.title]


def test_comparisons_are_all_seen() -> None:
    """Whatever alerts compare with a number by `<` or `>` is known, but whether there is TLS."""
    text = "".join(
        rule["expr"]
        for group in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    )
    assert len(re.findall(r" [<>] [\d.]", text)) - 1 == len(limits()) > 20


def test_lines_without_an_alert() -> None:
    """The objective's line is that of its recording rule, the GPU's is the setting's default."""
    (objective,) = set(re.findall(r'le="([\d.]+)"', (RULES / "recording.yml").read_text()))
    default = Settings(allowed_embedding_models=("any",)).gpu_pressure_threshold
    assert panel("service", "Duration of successful requests").limit == float(objective)
    assert panel("gpu", "Memory in use").limit == default


def panel(page: str, title: str) -> Panel:
    """A panel of panels.yml."""
    (found,) = (
        one for said in pages() if said.name == page for one in said.panels if one.title == title
    )
    return found


def test_compose_provisions_them() -> None:
    """Grafana looks where they are mounted, begins with `service`, and knows Prometheus."""
    said = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    grafana = said["grafana"]
    mounts = dict(one.removesuffix(":ro").split(":") for one in grafana["volumes"])
    inside = {to: DEPLOY / source for source, to in mounts.items() if source.startswith("./")}
    (place,) = (path for path, source in inside.items() if source == GRAFANA)
    (provider,) = provisioned(inside, "dashboards")["providers"]
    assert provider["options"]["path"] == place
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{place}/service.json"
    (source,) = provisioned(inside, "datasources")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert "prometheus" in said
    scraped = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def provisioned(inside: dict[str, Path], kind: str) -> Any:
    """What Grafana is told of one kind, by a file in its own directory."""
    (path,) = (
        source
        for target, source in inside.items()
        if target.startswith(f"/etc/grafana/provisioning/{kind}/")
    )
    return yaml.safe_load(path.read_text())


def test_kustomization() -> None:
    """It names every dashboard, and the label that Grafana's sidecar looks for."""
    (made,) = yaml.safe_load((GRAFANA / "kustomization.yaml").read_text())["configMapGenerator"]
    assert sorted(made["files"]) == sorted(f"{name}.json" for name in DASHBOARDS)
    assert made["options"]["labels"]["grafana_dashboard"] == "1"


def test_config_map() -> None:
    """`kubectl kustomize deploy/grafana` makes what Grafana's sidecar looks for, of every file."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(GRAFANA)]
    made = yaml.safe_load(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert made["kind"] == "ConfigMap"
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(text) for name, text in made["data"].items()} == {
        f"{name}.json": one for name, one in DASHBOARDS.items()
    }
    assert len(json.dumps(made)) < 262_144, "`kubectl apply` keeps a copy in an annotation"


def test_picture() -> None:
    """The README's picture is of the panels that `service.json` has today, and is small."""
    path = GRAFANA / "dashboard.png"
    with Image.open(path) as picture:
        assert picture.info["Description"] == subject(DASHBOARDS["service"]), (
            "run `python -m deploy.picture`"
        )
    assert path.stat().st_size < 200_000


def card() -> Metrics:
    """What a server shows that has a GPU, and models that push each other out."""
    metrics = Metrics("card")
    metrics.record_memory("0", used=1 << 30, total=4 << 30, busy=50.0)
    metrics.evictions.labels("m", "room").inc()
    return metrics


@contextmanager
def exposed(metrics: Metrics) -> Iterator[str]:
    """The address of an exposition."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text, kind = metrics.render(self.headers["Accept"])
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its signature
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


def traffic(demo: Server) -> None:
    """Requests of all kinds, more at once than may wait; some are served, some are refused."""
    asked = [
        ("/api/embed", {"model": DEMO, "text": "Hello"}),
        ("/api/embed/batch", {"model": DEMO, "texts": ["word " * 600] * 4}),
        ("/api/rerank", {"model": DEMO, "query": "a", "documents": ["b", "c"]}),
    ]

    def post(number: int) -> int:
        path, body = asked[number % len(asked)]
        return demo.post(path, json=body, headers={"Authorization": "Bearer secret"}).status_code

    with ThreadPoolExecutor(12) as threads:
        assert {*threads.map(post, range(24))} <= {200, 503}


def queries() -> dict[tuple[str, str, str], str]:
    """Every query of every panel."""
    return {
        (name, panel["title"], target["legendFormat"]): as_asked(target["expr"], "1m")
        for name, panel in PANELS
        for target in panel["targets"]
    }


def has_data(client: httpx.Client, query: str) -> bool:
    """Whether there is a number; the query must be valid."""
    answer = client.get("query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    return any(not math.isnan(float(one["value"][1])) for one in answer["data"]["result"])


@pytest.mark.full
def test_every_query_has_an_answer(tmp_path: Path) -> None:
    """Every panel, variable and annotation is valid, and every panel shows numbers of a server."""
    flags = ("--demo", "--max-concurrent-requests", "1", "--max-queue-depth", "4")
    with server(*flags, INFERENCE_API_KEYS="secret") as demo, exposed(card()) as cards:
        demo.until("/health/ready")
        targets = {"real": str(demo.base_url), "card": cards}
        with prometheus(tmp_path, targets, "500ms") as client:
            until(client, "query", query="sum(up) == 2")
            missing, deadline = queries(), time.monotonic() + 60
            assert len(missing) > 80
            while missing and time.monotonic() < deadline:
                traffic(demo)
                missing = {at: one for at, one in missing.items() if not has_data(client, one)}
            assert not missing
            for one in DASHBOARDS.values():
                for annotation in one["annotations"]["list"]:
                    has_data(client, as_asked(annotation["target"]["expr"], "1m"))
                for variable in one["templating"]["list"][1:]:
                    found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
                    assert found
                    match = {"match[]": as_asked(found[1], "1m")}
                    values = until(client, f"label/{found[2]}/values", **match)
                    known = {"job": "embedding-server", "instance": "real", "model": DEMO}
                    assert known[found[2]] in values
