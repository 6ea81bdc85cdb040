"""`python -m deploy.picture`: `grafana/dashboard.png`, drawn from a real run.

The demo model serves a load that changes, Prometheus with the rules of `prometheus` scrapes it, and
the queries of `grafana/service.json` are asked as Grafana would ask them. Grafana itself is not
run: what it would draw is drawn by matplotlib. It takes four minutes.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.corpus import corpus
from benchmarks.load import bodies, drive
from benchmarks.openloop import Order, outcome, running
from benchmarks.scrape import as_asked, prometheus, until
from benchmarks.server import Server, demo_server
from deploy.drawing import Line, draw, named
from deploy.panels import GRAFANA
from embedding_server.catalog.demo import demo_model

_SCRAPE_SECONDS, _WINDOW = 2, "12s"
_BULK = 32
_PEAK_SECONDS = 8.0


class Phase(msgspec.Struct, frozen=True):
    """So many times the texts that the server was seen to carry, for a while."""

    name: str
    times: float
    seconds: float


_PHASES = (
    Phase("calm", 0.15, 45),
    Phase("busy", 0.75, 60),
    Phase("three times what it carries", 3.0, 50),
    Phase("calm", 0.15, 60),
)


def _orders(server: Server, carried: float, phase: Phase) -> Iterator[Order]:
    """Single texts and bulk, half of the texts each."""
    spec, texts = demo_model(), corpus()
    for size in (1, _BULK):
        yield Order(
            url=f"{server.url}/api/embed",
            bodies=bodies(spec.id, texts, size),
            rate=carried * phase.times / 2 / size,
            seconds=phase.seconds,
        )


def _carried(server: Server) -> float:
    """Texts per second of a closed loop."""
    requests = bodies(demo_model().id, corpus(), _BULK)
    driven = drive(f"{server.url}/api/embed", requests, 2, _PEAK_SECONDS)
    return _BULK * driven.requests / driven.seconds


def _load(server: Server, carried: float) -> Iterator[float]:
    """All phases, one after the other; when each has its last answer."""
    for phase in _PHASES:
        with ExitStack() as stack:
            processes = [
                stack.enter_context(running(order)) for order in _orders(server, carried, phase)
            ]
            for process in processes:
                done = outcome(process)
                statuses = {one.status for one in done.answers}
                counts = {status: done.count(status) for status in sorted(statuses)}
                print(f"{phase.name}: {done.rate:.1f} requests/s, {counts}")
        yield float(math.floor(time.time()))


def _ask(client: httpx.Client, target: dict[str, Any], begin: float, end: float) -> Iterator[Line]:
    """What Prometheus answers to a panel's query, on one time axis for all."""
    query = as_asked(target["expr"], _WINDOW)
    between = {"start": begin, "end": end, "step": _SCRAPE_SECONDS}
    answer = client.get("query_range", params={"query": query, **between}).json()
    times = [_SCRAPE_SECONDS * at for at in range(1 + int((end - begin) / _SCRAPE_SECONDS))]
    for series in answer["data"]["result"]:
        seen = {
            round((at - begin) / _SCRAPE_SECONDS): float(value) for at, value in series["values"]
        }
        values = [seen.get(at, math.nan) for at in range(len(times))]
        yield Line(named(target["legendFormat"], series["metric"]), times, values)


def _caption(ends: list[float]) -> str:
    """What was done until when, in seconds."""
    clocks = [f"{int(end) // 60}:{int(end) % 60:02d}" for end in ends]
    load = ", ".join(
        f"{phase.name} until {clock}" for phase, clock in zip(_PHASES, clocks, strict=True)
    )
    cores = len(os.sched_getaffinity(0))
    return f"The demo model on {cores} cores: {load}. Scraped every {_SCRAPE_SECONDS} s."


def _seen(server: Server, dashboard: dict[str, Any]) -> tuple[dict[int, list[Line]], list[float]]:
    """What each panel, by its id, has to show after the load, and when the phases ended."""
    carried = _carried(server)
    print(f"carried: {carried:.0f} texts/s")
    with (
        tempfile.TemporaryDirectory() as scratch,
        prometheus(Path(scratch), {"server-1": server.url}, f"{_SCRAPE_SECONDS}s") as client,
    ):
        until(client, "query", query="sum(up) == 1")
        begin = float(math.floor(time.time()))
        ends = [end - begin for end in _load(server, carried)]
        answers = {
            panel["id"]: [
                line
                for target in panel["targets"]
                for line in _ask(client, target, begin, begin + ends[-1])
            ]
            for panel in dashboard["panels"]
        }
        return answers, ends


def main() -> None:
    """Run, ask, draw."""
    dashboard = json.loads((GRAFANA / "service.json").read_text())
    with demo_server() as server:
        answers, ends = _seen(server, dashboard)
    draw(dashboard, answers, _caption(ends), GRAFANA / "dashboard.png")


if __name__ == "__main__":
    main()
