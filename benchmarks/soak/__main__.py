"""`make soak`: mixed clients, models that come and go, and faults; nothing may be wrong or left.

In every cycle all faults are injected while clients are at work; then nobody asks, all models are
unloaded, and what the server holds is compared with the first such moment. Results are printed and
stored in `soak.json` in `benchmarks`; status 1 if anything was wrong.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.server import demo_server, free_port
from benchmarks.soak.asks import DEFAULTS
from benchmarks.soak.clients import Crowd
from benchmarks.soak.faults import Site, inject
from benchmarks.soak.known import ask_known
from benchmarks.soak.models import CROSS, DEMO, MODELS, write_models
from benchmarks.soak.readings import Reading, leaks, middle, read, thread_names
from benchmarks.soak.report import Report, show, store

_MINUTES = 20.0
_CYCLE_SECONDS = 45.0
"""Clients are at work for so long at least."""
_READING_SECONDS = 3.0
_QUIET_SECONDS, _QUIET_READINGS = 30.0, 5
_KEY = "first-key"
_SOAKED = {
    "max-loaded-models": "3",
    "model-ttl-seconds": "2",
    "max-queue-depth": "32",
    "max-body-bytes": "1M",
    "default-model": ",".join(DEFAULTS),
    "otel-enabled": "true",
    "otel-logs-enabled": "true",
}
_EXPECTED = {"model.failed", "telemetry.unsent", "reload.failed", "cache.unsaved"}
"""Warnings and errors of the log that the faults explain."""


def main() -> int:
    """Soak, print, store; the exit status."""
    parser = argparse.ArgumentParser(description="mixed clients and faults for a while")
    parser.add_argument("minutes", nargs="?", type=float, default=_MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = _soak(Path(scratch), 60 * asked.minutes, asked.seed)
    show(report)
    store(report)
    return bool(report.failures)


def _soak(scratch: Path, seconds: float, seed: int) -> Report:
    models, cache, keys = scratch / "models", scratch / "cache", scratch / "keys"
    write_models(models)
    keys.write_text(f"clients={_KEY}\n")
    flags = ["--model-path", str(models), "--allowed-rerank-models", f"{CROSS},{DEMO}"]
    flags += ["--allowed-embedding-models", ",".join(one for one in MODELS if one != CROSS)]
    known = ask_known(flags, cache)
    flags += ["--cache-dir", str(cache), "--api-keys", f"@{keys}"]
    flags += ["--otel-endpoint", f"http://127.0.0.1:{free_port()}"]
    flags += [word for name, value in _SOAKED.items() for word in (f"--{name}", value)]
    with _log() as (events, log), demo_server(*flags, log=log) as server:
        crowd = Crowd(server.url, _KEY, known, seed)
        site = Site(server, crowd, models, cache, keys)
        return asyncio.run(_cycles(site, seconds, events))


async def _cycles(site: Site, seconds: float, events: Counter[str]) -> Report:
    began = time.monotonic()
    quiet: list[Reading] = []
    busy: list[Reading] = []
    names: list[Counter[str]] = []
    while not quiet or time.monotonic() - began < seconds:
        await site.crowd.run(_cycle(site, len(quiet), busy, began))
        quiet.append(await _quiet(site, began))
        names.append(thread_names(site.server.pid))
        print(f"{quiet[-1].seconds:5.0f} s, quiet: {quiet[-1]}", flush=True)
    judge = site.crowd.judge
    for leak in leaks(quiet):
        judge.fail(f"left behind: {leak}")
    if names[0] != names[-1]:
        print(f"threads at first {names[0]}, at the end {names[-1]}")
    for event in events.keys() - _EXPECTED:
        judge.fail(f"{events[event]} times in the log: {event}")
    return Report.of(site.crowd, quiet, busy, events, time.monotonic() - began)


async def _cycle(site: Site, number: int, busy: list[Reading], began: float) -> None:
    """All faults, and readings meanwhile."""
    faults = asyncio.create_task(inject(site, number))
    started = time.monotonic()
    while not faults.done() or time.monotonic() - started < _CYCLE_SECONDS:
        await asyncio.sleep(_READING_SECONDS)
        if not site.crowd.judge.lenient:  # it would be refused
            busy.append(await asyncio.to_thread(read, site.server, began))
    await faults


async def _quiet(site: Site, began: float) -> Reading:
    """The server once nobody asks and nothing is loaded."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while (now := await asyncio.to_thread(read, site.server, began)).model_bytes or now.admitted:
        if time.monotonic() > deadline:
            site.crowd.judge.fail(f"not quiet after {_QUIET_SECONDS:.0f} s: {now}")
            break
        await asyncio.sleep(0.5)
    readings = []
    for _ in range(_QUIET_READINGS):
        await asyncio.sleep(1.0)
        readings.append(await asyncio.to_thread(read, site.server, began))
    return middle(readings)


@contextmanager
def _log() -> Iterator[tuple[Counter[str], int]]:
    """Warnings and errors by their event, and where the log is to be written: a pipe."""
    events: Counter[str] = Counter()
    reading, writing = os.pipe()

    def count() -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {"level": "error", "event": line.strip()[:200]}
                if event["level"] not in ("debug", "info"):
                    name = event["event"]
                    details = event.get("message"), event.get("exception")
                    events[name if name in _EXPECTED else f"{name} {details}"] += 1

    reader = threading.Thread(target=count, daemon=True)
    reader.start()
    try:
        yield events, writing
    finally:
        os.close(writing)
        reader.join(10)


if __name__ == "__main__":
    sys.exit(main())
