"""What came of the soak: its tables, and the file that has all of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.soak.asks import KINDS
from benchmarks.soak.clients import Crowd
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.known import TOLERANCE
from benchmarks.soak.readings import COUNTED, Reading, memory_by_quarter

_RESULTS = Path(__file__).parent.with_name("soak.json")
_COLUMNS = ("right", "wrong", "refused", "expired", "left", "broken", "gave up")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    seconds: float
    outcomes: Mapping[str, Mapping[str, int]]
    """What was asked -> what came of it -> how often."""
    worst: Mapping[str, float]
    """Kind -> the largest difference of any number from what it should be."""
    closest: float
    """The least difference between the vectors of two texts."""
    quiet: Sequence[Reading]
    busy: Sequence[Reading]
    events: Mapping[str, int]
    """Warnings and errors in the log."""
    failures: Sequence[str]

    @classmethod
    def of(
        cls,
        crowd: Crowd,
        quiet: Sequence[Reading],
        busy: Sequence[Reading],
        events: Mapping[str, int],
        seconds: float,
    ) -> "Report":
        """Of clients and readings."""
        judge = crowd.judge
        outcomes: dict[str, dict[str, int]] = {}
        for (name, outcome), count in sorted(judge.counts.items()):
            outcomes.setdefault(name, {})[outcome] = count
        return cls(
            seconds=round(seconds, 1),
            outcomes=outcomes,
            worst=judge.worst,
            closest=crowd.known.closest,
            quiet=quiet,
            busy=busy,
            events=dict(events),
            failures=judge.failures,
        )


def show(report: Report) -> None:
    """Print the tables."""
    print(f"\n{'requests':24}" + "".join(f"{one:>9}" for one in _COLUMNS) + "    worst")
    total: Counter[str] = Counter()
    for name in KINDS:
        found = report.outcomes.get(name, {})
        total.update(found)
        _row(name, found, report.worst.get(name, 0.0))
    _row("all", total, max(report.worst.values(), default=0.0))
    print(f"tolerance {TOLERANCE:.0e}; the two closest texts differ by {report.closest:.0e}")
    for name in ("wrong requests", "probes"):
        print(f"{name}: {report.outcomes.get(name, {})}")
    for name in FAULTS:
        print(f"{name:32}{report.outcomes.get(name, {}).get('injected', 0):4}")
    print(f"log: {dict(report.events)}")
    _show_readings(report)
    print(f"\n{report.seconds:.0f} s; {len(report.failures)} failures", *report.failures, sep="\n")


def _row(name: str, found: Mapping[str, int], worst: float) -> None:
    print(f"{name:24}" + "".join(f"{found.get(one, 0):9}" for one in _COLUMNS) + f"{worst:9.0e}")


def _show_readings(report: Report) -> None:
    first, last = report.quiet[0], report.quiet[-1]
    print(f"\n{'held':24}{'first':>9}{'last':>9}{'busiest':>9}")
    for name in ("anonymous", "proportional", "resident", *COUNTED):
        most = max(getattr(one, name) for one in report.busy)
        print(f"{name:24}{getattr(first, name):9}{getattr(last, name):9}{most:9}")
    quarters = ", ".join(f"{one:.1f}" for one in memory_by_quarter(report.quiet))
    print(f"anonymous memory by quarter, MiB: {quarters}")


def store(report: Report) -> None:
    """Write all of it beside the other results."""
    _RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
