"""What a server holds, by what the system and its own metrics say; and whether that grows."""

import itertools
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec

from benchmarks.server import Server

GROWTH_MIB = 64.0
"""How far the allocator's leftovers may move: without any rise, quiet moments were seen 50 apart.
The demo model, were it kept, is 110."""

_GAUGES = {
    "tasks": "inference_event_loop_tasks",
    "admitted": "inference_admitted_requests",
    "waiting": "inference_queue_depth",
    "body_bytes": "inference_queued_bytes",
    "queued_texts": "inference_queued_texts",
    "running": "inference_running_batches",
    "model_bytes": "inference_model_resident_bytes",
}
COUNTED = ("descriptors", "threads", *_GAUGES)
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Python's pool for blocking calls grows to so many threads as they are wanted, and keeps them."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A moment; memory in MiB."""

    seconds: float
    anonymous: float
    proportional: float
    resident: float
    descriptors: int
    threads: int
    tasks: int
    admitted: int
    waiting: int
    body_bytes: int
    queued_texts: int
    running: int
    model_bytes: int


def read(server: Server, since: float) -> Reading:
    """The server now; `since` is when its seconds began, by `time.monotonic`."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    rollup = Path(f"/proc/{server.pid}/smaps_rollup").read_text()
    return Reading(
        seconds=round(time.monotonic() - since, 1),
        anonymous=_mib(rollup, "Anonymous"),
        proportional=_mib(rollup, "Pss"),
        resident=_mib(rollup, "Rss"),
        descriptors=len(os.listdir(f"/proc/{server.pid}/fd")),
        threads=len(os.listdir(f"/proc/{server.pid}/task")),
        **{field: _sum(text, name) for field, name in _GAUGES.items()},
    )


def middle(readings: Sequence[Reading]) -> Reading:
    """The median of each number."""
    rows = [msgspec.structs.asdict(one) for one in readings]
    medians = {name: statistics.median_low([row[name] for row in rows]) for name in rows[0]}
    return msgspec.convert(medians, Reading)


def leaks(quiet: Sequence[Reading]) -> list[str]:
    """What is left in quiet moments that was not there in the first of them.

    Counts must be the same, but for threads of Python's pool.
    Memory may move by `GROWTH_MIB`, and by the medians of the quarters it must not rise by so much
    in another run of this length.
    """
    first, last = quiet[0], quiet[-1]
    grown = {name: getattr(last, name) - getattr(first, name) for name in COUNTED}
    if 0 <= grown["threads"] <= POOL_THREADS:
        del grown["threads"]
    found = [
        f"{name}: {getattr(first, name)} at first, {getattr(last, name)} at the end"
        for name, by in grown.items()
        if by
    ]
    if (growth := last.anonymous - first.anonymous) > GROWTH_MIB:
        found.append(f"anonymous memory grew by {growth:.1f} MiB")
    quarters = memory_by_quarter(quiet)
    if (rise := slope(quarters)) * len(quarters) > GROWTH_MIB:
        found.append(f"anonymous memory rises by {rise:.1f} MiB a quarter")
    return found


def memory_by_quarter(quiet: Sequence[Reading]) -> list[float]:
    """The median anonymous memory of each quarter of the quiet moments, in order."""
    count = min(4, len(quiet))
    edges = [len(quiet) * at // count for at in range(count + 1)]
    return [
        statistics.median(one.anonymous for one in quiet[start:end])
        for start, end in itertools.pairwise(edges)
    ]


def slope(values: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil and Sen's), per step."""
    pairs = [
        (values[late] - values[early]) / (late - early)
        for late in range(len(values))
        for early in range(late)
    ]
    return statistics.median(pairs) if pairs else 0.0


def thread_names(pid: int) -> Counter[str]:
    """How many threads have which name."""
    return Counter(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm"))


def _mib(rollup: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found, name
    return round(int(found[1]) / 1024, 1)


def _sum(metrics: str, name: str) -> int:
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
    assert found, name
    return round(sum(map(float, found)))
