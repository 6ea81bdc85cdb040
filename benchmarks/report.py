"""The result of a run: printed, stored as JSON, drawn as PNG."""

from pathlib import Path

import msgspec
from matplotlib.figure import Figure

from benchmarks.latency import Latency
from benchmarks.limit import Limit, speed
from benchmarks.variants import Trade
from embedding_server.serving.profile import Profile

_RESULTS = Path(__file__).with_name("results.json")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load on our server, or a peer.

    `of_best_limit` is the share of the best point of both sweeps, `of_limit_beside` of what the
    session did just before and after each round; `of_ceiling` is the latter's share of what the
    schedule alone was simulated to reach.
    """

    name: str
    tokens_per_second: float
    texts_per_second: float
    of_best_limit: float
    of_limit_beside: float
    of_ceiling: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one run measured, on one machine."""

    machine: str
    corpus: str
    mean_tokens: float
    """Tokens per text; texts per second are by it, for every row."""
    profile: Profile
    before: list[Limit]
    after: list[Limit]
    rows: list[Row]
    ceilings: dict[int, float]
    """Texts in flight -> the schedule's simulated share of the limit."""
    peers: dict[str, Row | None]
    """None where one is not installed."""
    latency: Latency
    start_seconds: float
    planning_ms: dict[str, float]
    """Kind of graph -> planning one batch of 20,000 pending texts."""
    speedups: dict[str, dict[str, float]]
    """Other graph -> batch -> how many times as fast ours is."""
    neighbours: float
    """Largest difference that a text's neighbours make to its vector of length 1."""
    variants: dict[str, float]
    trades: list[Trade]

    @property
    def limit(self) -> Limit:
        """The best point of both sweeps."""
        return max(self.before + self.after, key=speed)


def show(report: Report) -> None:
    """Print the tables."""
    print(f"{report.machine}\n{report.corpus}\n")
    print(f"{'bare session':30} {'before':>9} {'after':>9}  tokens/s")
    for one, two in zip(report.before, report.after, strict=True):
        name = f"{one.slots} at once, {one.budget} tokens"
        print(f"{name:30} {one.tokens_per_second:9.0f} {two.tokens_per_second:9.0f}")
    limit = report.limit
    names = ("tokens/s", "texts/s", "of best", "beside", "of ceiling")
    heads = "".join(f"{name:>12}" for name in names)
    print(f"\n{'':30}{heads}")
    texts = limit.tokens_per_second / report.mean_tokens
    print(f"{'the limit':30}{limit.tokens_per_second:12.0f}{texts:12.0f}")
    for row in (*report.rows, *filter(None, report.peers.values())):
        shares = (row.of_best_limit, row.of_limit_beside, row.of_ceiling)
        cells = "".join(f"{'' if share is None else format(share, '.2f'):>12}" for share in shares)
        print(f"{row.name:30}{row.tokens_per_second:12.0f}{row.texts_per_second:12.0f}{cells}")
    for name in (name for name, row in report.peers.items() if row is None):
        print(f"{name:30}{'absent':>12}")
    print(f"\nthe server as measured at its first start: {report.profile}")
    print("\nthe schedule's ceiling, texts in flight -> share of the limit")
    print("  ".join(f"{count}: {share:.3f}" for count, share in report.ceilings.items()))
    for kind, milliseconds in report.planning_ms.items():
        print(f"planning one batch of 20,000 pending texts, {kind} graph: {milliseconds:.3f} ms")
    for other, factors in report.speedups.items():
        print(f"\nour packed graph against {other}, one thread")
        for name, factor in factors.items():
            print(f"{name:30} {factor:9.2f} x")
    print()
    for name, factor in report.variants.items():
        print(f"{name:30} {factor:9.2f} x")
    print("\nint8: layers in fp32, times as fast, least cosine, difference by neighbours")
    for trade in report.trades:
        print(f"{trade.fp32_share:9.3f} {trade.speed:9.2f} {trade.least_cosine:9.4f}", end=" ")
        print(f"{trade.neighbours:9.1e}")
    print(f"\nsecond start to ready: {report.start_seconds:.2f} s")
    print(f"\nlargest difference a text's neighbours make: {report.neighbours:.1e}")
    print("\nmilliseconds, one short text")
    for name, value in msgspec.structs.asdict(report.latency).items():
        print(f"{name.replace('_', ' '):30} {value:9.2f}")


def store(report: Report) -> None:
    """Write `results.json` and `results.png` beside this file."""
    _RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    bars = {"the limit": report.limit.tokens_per_second / report.mean_tokens}
    rows = (*report.rows, *filter(None, report.peers.values()))
    bars |= {row.name: row.texts_per_second for row in rows}
    axes.barh(list(bars)[::-1], list(bars.values())[::-1])
    axes.set_xlabel("texts per second")
    figure.savefig(_RESULTS.with_suffix(".png"), bbox_inches="tight")
