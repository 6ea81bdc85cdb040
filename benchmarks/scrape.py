"""A real Prometheus, with the rules of deploy/prometheus, that scrapes what runs here."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import yaml

from benchmarks.server import free_port

_RULES = Path(__file__).parents[1] / "deploy" / "prometheus"
JOB = "embedding-server"


@contextmanager
def prometheus(directory: Path, targets: dict[str, str], interval: str) -> Iterator[httpx.Client]:
    """A client of the API of a Prometheus for `targets` (instance -> address); ends it by pid."""
    config = yaml.safe_load((_RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(_RULES / file) for file in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [
        {"targets": [address.removeprefix("http://")], "labels": {"instance": instance}}
        for instance, address in targets.items()
    ]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port, program = free_port(), which("prometheus")
    assert program, "prometheus is not installed"
    process = subprocess.Popen(
        [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]
    )
    with process, httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as client:
        try:
            yield client
        finally:
            process.terminate()


def until(client: httpx.Client, path: str, **params: str) -> Any:
    """The first answer of Prometheus that is not empty.

    Raises:
        AssertionError: there was none within half a minute.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            answer = client.get(path, params=params).json()["data"]
        except (httpx.TransportError, json.JSONDecodeError):
            answer = {}
        if found := answer.get("result", answer) if isinstance(answer, dict) else answer:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} {params}: {client.get(path, params=params).text}")


def as_asked(expression: str, window: str) -> str:
    """A dashboard's expression with its variables' values: all instances, all models."""
    values = {"job": JOB, "__rate_interval": window}
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".*"), expression)
