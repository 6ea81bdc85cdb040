"""Every variable, command, port, path and metric that deploy/ and the Dockerfiles name is real."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from embedding_server import errors
from embedding_server.api import Face
from embedding_server.cli import _VERBS
from embedding_server.observability.metrics import Metrics
from embedding_server.settings import Settings, declared
from tests.deploy import DEPLOY, ROOT
from tests.deploy.render import walk

SUFFIXES = {".yaml", ".yml", ".conf", ".md", ".service", ".json", ""}
FILES = sorted(
    path
    for path in [*DEPLOY.rglob("*"), *ROOT.glob("Dockerfile.*")]
    if path.is_file() and (path.suffix in SUFFIXES or path.name.startswith("Dockerfile."))
    and not {"grafana", "prometheus"} & set(path.relative_to(ROOT).parts)  # tested beside them
)  # fmt: skip
PORT = Settings(allowed_embedding_models=("any",)).port

FOREIGN_VARIABLES = {"CORS_ORIGINS"}
"""Variables of predecessors, in the tables that lead away from them."""
FOREIGN_PORTS = {
    53: "DNS", 443: "the hub", 3000: "Grafana, TEI", 4317: "OTLP", 7860: "Spaces",
    7997: "Infinity", 8000: "fast API", 9090: "Prometheus",
}  # fmt: skip
OTHER_NAMES = {"inference_queue_wait_p90_seconds", "gpu_memory"}
"""What prometheus-adapter calls what it computes, and a reason of `inference_rejections_total`."""


def named(pattern: str) -> dict[str, set[str]]:
    """What a pattern finds -> the files it is in."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for name in re.findall(pattern, path.read_text()):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_files() -> None:
    """There are files of all kinds."""
    assert {path.suffix for path in FILES} >= {".yaml", ".conf", ".md", ".service", "", ".cuda"}


def test_variables() -> None:
    """Every variable of a setting's family is a setting."""
    known = {row.env for row in declared()}
    codes = {getattr(one, "code", "") for one in vars(errors).values()}
    families = {name.split("_")[0] for name in known if name.isupper()}
    found = named(rf"(?<![\w.-])((?:{'|'.join(sorted(families))})_[A-Z0-9_]+)\b")
    wrong = found.keys() - known - FOREIGN_VARIABLES - codes
    assert not wrong, {name: found[name] for name in wrong}
    assert len(found.keys() & known) > 30


def test_commands() -> None:
    """Every `embedding-server VERB` is a verb."""
    found = named(r'embedding-server"?,? "?(serve|[a-z]+check|fetch|models|convert|cache|bench)\b')
    assert found.keys() <= _VERBS.keys()
    assert {"fetch", "serve", "bench"} <= found.keys()


def test_metrics() -> None:
    """Every metric is one that the server has, or a rule's."""
    families = [family.name for family in Metrics("test").registry.collect()]
    known = {name + suffix for name in families for suffix in ("", "_total", "_bucket", "_count")}
    found = named(r"(?<![\w/-])((?:inference|gpu)_[a-z0-9_]+)\b")
    wrong = found.keys() - known - OTHER_NAMES
    assert not wrong, {name: found[name] for name in wrong}
    assert "inference_queue_wait_seconds_bucket" in found


def test_paths() -> None:
    """Every path that looks like one of the server's is."""
    handlers = [one for one in Face.of().handlers if hasattr(one, "paths")]
    known = {re.sub(r":path\}", "}", path) for one in handlers for path in one.paths}
    known |= {
        "/health",
        "/swagger-ui",
        "/api/v1/models/{id}/load",
        "/models/{model_name}",
        "/v1",
        "/api/v1",
    }
    found = named(r"(?<![\w.}*-])(/(?:health|metrics|api|v1|v2|swagger-ui)\b[\w/{}-]*)")
    wrong = {path for path in found if path.rstrip("/") not in known}
    assert not wrong, {path: found[path] for path in wrong}
    assert "/health/ready" in found


def ports(path: Path) -> Iterator[int]:
    """Numbers that a file calls ports."""
    text = path.read_text()
    for number in re.findall(r"(?:[pP]ort|listen|EXPOSE|PORT)\"?(?: was|[:= ])+\"?(\d+)\b", text):
        yield int(number)
    for number in re.findall(r"(?:[a-z][\w-]*|(?:\d+\.){3}\d+):(\d{4,5})\b(?!-)", text):
        yield int(number)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ports(path: Path) -> None:
    """Every port is the server's, or a known one of others."""
    assert set(ports(path)) <= {PORT, *FOREIGN_PORTS}


def test_ports_are_seen() -> None:
    """The patterns find what they are for."""
    seen = {port for path in FILES for port in ports(path)}
    assert seen >= {PORT, 4317, 7860, 9090, 3000}


def test_compose() -> None:
    """Replicas have the addresses that nginx and Prometheus ask, and what is mounted exists."""
    said = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    nginx = set(re.findall(r"server (\d[\d.]+):8090", (DEPLOY / "nginx.conf").read_text()))
    scraped = re.findall(r"(server-\d):8090", (DEPLOY / "compose" / "prometheus.yml").read_text())
    for profile in ("cpu", "gpu"):
        services = [one for one in said["services"].values() if profile in one.get("profiles", [])]
        networks = [one["networks"]["default"] for one in services]
        assert {one["ipv4_address"] for one in networks} == nginx
        assert [alias for one in networks for alias in one["aliases"]] == scraped
        for one in services:
            drain = int(one["environment"]["INFERENCE_DRAIN_TIMEOUT_MS"])
            assert int(one["stop_grace_period"].removesuffix("s")) * 1000 > drain
            assert one["read_only"] is True
            assert (DEPLOY / one["build"]["context"] / one["build"]["dockerfile"]).exists()
    images: list[str] = []
    walk(said["services"], lambda at, value: images.append(value) if at.endswith("image") else None)
    assert all(re.search(r":v?\d|:(cpu|cuda)$", image) for image in images), (
        "an image is not pinned"
    )
    for service in said["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            other = source in ("./prometheus", "./grafana")  # rules and dashboards
            assert source in said["volumes"] or other or (DEPLOY / source).exists(), source


def test_readme_names_every_directory() -> None:
    """The operations page knows all that is here."""
    page = (DEPLOY / "README.md").read_text()
    here = {path.stem for path in DEPLOY.iterdir() if path.name[0] not in "._"}
    assert {
        name for name in here - {"README", "autoscaler", "fleet", "compose"} if name not in page
    } == set()
