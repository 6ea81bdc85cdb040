"""`python -m deploy.simulate`: a day of traffic against the autoscaler, without a cluster.

Traffic that rises and falls with the day, bursts that double it at once, and one tenant that
re-indexes a billion chunks in a month, paced. What a replica carries is measured (README, Speed);
the autoscaler's numbers come from its manifest, admission's from the server's code. It writes
`simulation.json`, `simulation.png` and the table in README.md; a test repeats the first hours.
"""

import argparse
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from deploy.autoscaler import SYNC_SECONDS, Autoscaler, Rule, manifest_rule
from deploy.fleet import Fleet, Rates, Second

HERE = Path(__file__).parent
RESULTS, README = HERE / "simulation.json", HERE / "README.md"
DAY, HOUR, SCRAPE_SECONDS, WINDOW_SECONDS = 86_400, 3600, 15, 60
SHORT_SECONDS = 3 * HOUR
TABLE_BEGIN, TABLE_END = "<!-- simulation -->\n", "<!-- end of simulation -->\n"


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What is assumed of servers, clouds and clients."""

    single_texts: float = 122.0
    """Per second and replica of 2 cores: README, "1 text x 32 connections"."""
    bulk_texts: float = 127.0
    """README, "32 texts x 4 connections"."""
    tokens_per_second: float = 6175.0
    """README, tokens/s of single texts."""
    inside_tokens: int = 8 * 256
    """Eight batches of 256 tokens are admitted per lane: README, Design."""
    refusal_seconds: float = 1.9e-4
    """README, Overload: 1,100 refusals a second cost 0.21 of the goodput."""
    chunks: float = 1e9
    chunks_days: float = 30.0
    start_seconds: int = 120
    """A node 90 s, the image 20 s, the model 10 s: an assumption. The server itself is ready 1.3 s
    after its second start (README)."""
    dollars_per_hour: float = 0.10
    """Of 2 cores and 4 GB: an assumption."""
    bursts: int = 8
    burst_times: float = 2.0
    trough: float = 0.1
    """Traffic at night, of the peak's."""
    seed: int = 10

    @property
    def rates(self) -> Rates:
        """What one replica carries."""
        return Rates(
            singles=self.single_texts,
            bulk=self.bulk_texts / 32,
            inside=self.inside_tokens / self.tokens_per_second,
            refusal=self.refusal_seconds,
        )


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One day."""

    name: str
    peak: float
    """Single texts per second at the busiest hour, without bursts."""
    tenant: bool = False
    by_wait_alone: bool = False


SCENARIOS = (
    Scenario(name="100 texts/s", peak=100),
    Scenario(name="250 texts/s", peak=250),
    Scenario(name="500 texts/s", peak=500),
    Scenario(name="500 texts/s, by the wait alone", peak=500, by_wait_alone=True),
    Scenario(name="500 texts/s and the tenant", peak=500, tenant=True),
    Scenario(name="1,000 texts/s and the tenant", peak=1000, tenant=True),
)
MAIN = SCENARIOS[4]


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """What an hour, or a day, came to."""

    replicas: float
    """The mean; starting ones cost, too."""
    most_replicas: int
    wait_p50: float
    wait_p99: float
    """Seconds in line, of requests that were let in."""
    refused: float
    """Of all tries."""
    given_up: float
    """Of all requests of single texts."""
    texts: float
    busy: float
    dollars: float
    congested_minutes: int
    """In which the condition of the alert InferenceQueueCongested holds."""


class Alerts(msgspec.Struct, frozen=True, kw_only=True):
    """Thresholds of deploy/prometheus/alerts.yml that a day is judged by."""

    congested_wait_seconds: float = 2.0
    congested_fill: float = 0.5
    refused: float = 0.05


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """`simulation.json`."""

    inputs: Inputs
    rule: Rule
    alerts: Alerts
    days: dict[str, Hour]
    hours: list[Hour]
    """Of "500 texts/s and the tenant"."""
    first_hours: Hour
    """Of the same, for the test that repeats them."""


def demand(inputs: Inputs, scenario: Scenario) -> Iterator[float]:
    """New requests of one text, second by second."""
    chance = random.Random(inputs.seed)  # noqa: S311 - must repeat itself
    begins = [chance.randrange(DAY) for _ in range(inputs.bursts)]
    bursts = [(begin, begin + chance.randrange(120, 600)) for begin in begins]
    for now in range(DAY):
        height = (0.5 - 0.5 * math.cos(2 * math.pi * (now / HOUR - 4) / 24)) ** 1.3
        rate = scenario.peak * (inputs.trough + (1 - inputs.trough) * height)
        if any(begin <= now < end for begin, end in bursts):
            rate *= inputs.burst_times
        yield max(0.0, chance.gauss(rate, math.sqrt(rate)))


class Tenant:
    """Sends its day's share evenly, and what was refused a little faster later."""

    def __init__(self, inputs: Inputs, scenario: Scenario) -> None:
        share = inputs.chunks / inputs.chunks_days / 32 / DAY
        self._pace = share if scenario.tenant else 0.0
        self._backlog = 0.0

    def sends(self) -> float:
        """Requests of 32 texts in this second."""
        self._backlog += self._pace
        sent = min(self._backlog, 1.5 * self._pace)
        self._backlog -= sent
        return sent

    def refused(self, count: float) -> None:
        """So many come back."""
        self._backlog += count


def day(
    inputs: Inputs, scenario: Scenario, rule: Rule, seconds: int = DAY
) -> list[tuple[int, Second]]:
    """Replicas that cost, and what happened, for every second."""
    if scenario.by_wait_alone:
        rule = msgspec.structs.replace(rule, busy=None)
    scaler, fleet = Autoscaler(rule), Fleet(inputs.rates, rule.least, inputs.start_seconds)
    tenant = Tenant(inputs, scenario)
    past: list[tuple[int, Second]] = []
    for now, singles in zip(range(seconds), demand(inputs, scenario), strict=False):
        done, refused = fleet.second(now, singles, tenant.sends())
        tenant.refused(refused)
        past.append((fleet.replicas, done))
        if now % SYNC_SECONDS == 0 and now >= WINDOW_SECONDS + SCRAPE_SECONDS:
            seen = [one for _, one in past[-WINDOW_SECONDS - SCRAPE_SECONDS : -SCRAPE_SECONDS]]
            busy = statistics.fmean(one.busy for one in seen)
            wait = quantile(seen, 0.9)
            fleet.scale(now, scaler.decide(now, fleet.replicas, fleet.ready, wait, busy))
    return past


def quantile(seen: Sequence[Second], share: float) -> float:
    """Of the waits of all requests that were let in, seconds."""
    waits = sorted(pair for one in seen for pair in one.waits)
    rest = share * sum(count for _, count in waits)
    for wait, count in waits:
        rest -= count
        if rest <= 0:
            return wait
    return 0.0


def summary(inputs: Inputs, alerts: Alerts, past: Sequence[tuple[int, Second]]) -> Hour:
    """What these seconds came to."""
    seen = [one for _, one in past]
    answered, bulk = sum(one.answered for one in seen), sum(one.bulk for one in seen)
    given_up = sum(one.given_up for one in seen)
    refused = sum(one.refused for one in seen)
    mean = statistics.fmean(count for count, _ in past)
    return Hour(
        replicas=round(mean, 2),
        most_replicas=max(count for count, _ in past),
        wait_p50=round(quantile(seen, 0.5), 3),
        wait_p99=round(quantile(seen, 0.99), 3),
        refused=round(refused / (refused + answered + bulk), 5),
        given_up=round(given_up / (given_up + answered), 5),
        texts=round(answered + 32 * bulk),
        busy=round(statistics.fmean(one.busy for one in seen), 3),
        dollars=round(mean * len(past) / HOUR * inputs.dollars_per_hour, 3),
        congested_minutes=congested(alerts, seen),
    )


def congested(alerts: Alerts, seen: Sequence[Second]) -> int:
    """Minutes in which the alert about the line would be pending or firing."""
    minutes, window = 0, deque[Second](maxlen=5)
    for at in range(0, len(seen), 60):
        window.extend(seen[at : at + 60 : 12])
        slow = quantile(list(window), 0.9) > alerts.congested_wait_seconds
        minutes += slow or max(one.fill for one in window) > alerts.congested_fill
    return minutes


def simulate(inputs: Inputs, rule: Rule) -> Results:
    """All days."""
    alerts = Alerts()
    pasts = {one.name: day(inputs, one, rule) for one in SCENARIOS}
    main = pasts[MAIN.name]
    return Results(
        inputs=inputs,
        rule=rule,
        alerts=alerts,
        days={name: summary(inputs, alerts, past) for name, past in pasts.items()},
        hours=[summary(inputs, alerts, main[at : at + HOUR]) for at in range(0, DAY, HOUR)],
        first_hours=summary(inputs, alerts, main[:SHORT_SECONDS]),
    )


def table(results: Results) -> str:
    """The capacity table, as Markdown."""
    lines = [
        "| singles at the peak | replicas, mean and most | cores busy | wait, median and p99"
        " | refused | given up | congested | a day | a million texts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.days.items():
        lines.append(
            f"| {name} | {one.replicas:.1f}, {one.most_replicas} | {one.busy:.0%} |"
            f" {one.wait_p50:.2f} s, {one.wait_p99:.2f} s | {one.refused:.2%} |"
            f" {one.given_up:.3%} | {one.congested_minutes} min |"
            f" ${one.dollars:.2f} | ${1e6 * one.dollars / one.texts:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(past: Sequence[tuple[int, Second]], path: Path) -> None:
    """Replicas, wait, refusals and cost of a day."""
    import matplotlib  # noqa: PLC0415 - the tests that import this module do without

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    minutes = [past[at : at + 60] for at in range(0, len(past), 60)]
    hours = [at / 60 for at in range(len(minutes))]
    seen = [[one for _, one in minute] for minute in minutes]
    cost = [statistics.fmean(count for count, _ in minute) * 0.1 for minute in minutes]
    rows = {
        "texts/s": [sum(o.answered + 32 * o.bulk for o in one) / 60 for one in seen],
        "replicas": [statistics.fmean(count for count, _ in minute) for minute in minutes],
        "wait p90, s": [quantile(one, 0.9) for one in seen],
        "refused, 1/s": [sum(o.refused for o in one) / 60 for one in seen],
        "$ so far": [sum(cost[: at + 1]) / 60 for at in range(len(cost))],
    }
    figure, axes = pyplot.subplots(len(rows), 1, sharex=True, figsize=(9, 8))
    for axis, (label, values) in zip(axes, rows.items(), strict=True):
        axis.plot(hours, values, linewidth=0.9)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("hour of the day")
    figure.suptitle(MAIN.name)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})


def main() -> None:
    """Simulate, print and store."""
    parser = argparse.ArgumentParser(prog="python -m deploy.simulate", description=__doc__)
    for name, value in msgspec.structs.asdict(Inputs()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--dry", action="store_true", help="print only, store nothing")
    said = vars(parser.parse_args())
    dry = said.pop("dry")
    inputs, rule = Inputs(**said), manifest_rule()
    results = simulate(inputs, rule)
    print(table(results))
    if dry:
        return
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    text = README.read_text()
    before, after = text.split(TABLE_BEGIN)[0], text.split(TABLE_END)[1]
    README.write_text(before + TABLE_BEGIN + table(results) + TABLE_END + after)
    plot(day(inputs, MAIN, rule), HERE / "simulation.png")


if __name__ == "__main__":
    main()
