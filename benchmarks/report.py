"""The result of a run: printed, stored as JSON, drawn as PNG."""

from pathlib import Path

import msgspec
from matplotlib.figure import Figure

from benchmarks.latency import Latency
from benchmarks.limit import Limit

_RESULTS = Path(__file__).with_name("results.json")


class Row(msgspec.Struct, frozen=True):
    """One load on our server; `of_ceiling` where the schedule alone was simulated."""

    name: str
    tokens_per_second: float
    texts_per_second: float
    of_limit: float
    of_ceiling: float | None


class Report(msgspec.Struct, frozen=True):
    """Everything one run measured, on one machine."""

    machine: str
    corpus: str
    before: list[Limit]
    after: list[Limit]
    rows: list[Row]
    ceilings: dict[int, float]
    """Texts in flight -> the schedule's simulated share of the limit."""
    peers: dict[str, float | None]
    latency: Latency
    planning_ms: float
    speedups: dict[str, float]
    """Batches -> how many times as fast our graph is as a padded one."""
    neighbours: float
    """Largest difference that a text's neighbours make to its vector of length 1."""

    @property
    def limit(self) -> Limit:
        """The best point of both sweeps."""
        return max(self.before + self.after, key=lambda point: point.tokens_per_second)


def show(report: Report) -> None:
    """Print the tables."""
    print(f"{report.machine}\n{report.corpus}\n")
    print(f"{'bare session':30} {'before':>9} {'after':>9}  tokens/s")
    for one, two in zip(report.before, report.after, strict=True):
        name = f"{one.slots} x {one.threads} threads, {one.budget} tokens"
        print(f"{name:30} {one.tokens_per_second:9.0f} {two.tokens_per_second:9.0f}")
    limit = report.limit
    print(f"\n{'':30} {'tokens/s':>9} {'texts/s':>8} {'of limit':>9} {'of ceiling':>11}")
    print(f"{'the limit':30} {limit.tokens_per_second:9.0f} {limit.texts_per_second:8.0f}")
    for row in report.rows:
        share = "" if row.of_ceiling is None else f"{row.of_ceiling:11.2f}"
        numbers = f"{row.tokens_per_second:9.0f} {row.texts_per_second:8.0f} {row.of_limit:9.2f}"
        print(f"{row.name:30} {numbers} {share}")
    for name, speed in report.peers.items():
        print(f"{name:30} {'':9} " + ("  absent" if speed is None else f"{speed:8.0f}"))
    print("\nthe schedule's ceiling, texts in flight -> share of the limit")
    print("  ".join(f"{count}: {share:.3f}" for count, share in report.ceilings.items()))
    print(f"planning one batch of 20,000 pending texts: {report.planning_ms:.2f} ms")
    print("\nour packed graph against a padded one, one thread")
    for name, factor in report.speedups.items():
        print(f"{name:30} {factor:9.2f} x")
    print(f"\nlargest difference a text's neighbours make: {report.neighbours:.1e}")
    print("\nmilliseconds, one short text")
    for name, value in msgspec.structs.asdict(report.latency).items():
        print(f"{name.replace('_', ' '):30} {value:9.2f}")


def store(report: Report) -> None:
    """Write `results.json` and `results.png` beside this file."""
    _RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    bars = {"the limit": report.limit.texts_per_second}
    bars |= {row.name: row.texts_per_second for row in report.rows}
    bars |= {name: speed for name, speed in report.peers.items() if speed is not None}
    axes.barh(list(bars)[::-1], list(bars.values())[::-1])
    axes.set_xlabel("texts per second")
    figure.savefig(_RESULTS.with_suffix(".png"), bbox_inches="tight")
