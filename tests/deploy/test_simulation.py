"""deploy/simulation.json is what deploy/simulate.py makes of today's manifests and alerts."""

import math

import msgspec
import pytest

from deploy import simulate
from deploy.autoscaler import Autoscaler, Rule, manifest_rule
from deploy.fleet import Fleet
from embedding_server.serving.admission import _CAUTION
from embedding_server.settings import Settings
from tests.deploy import DEPLOY
from tests.deploy.render import documents, render

RESULTS = msgspec.json.decode(simulate.RESULTS.read_bytes(), type=simulate.Results)
KEDA = DEPLOY / "kubernetes" / "components" / "keda" / "scaledobject.yaml"
AGAIN = "run `python -m deploy.simulate`"


def test_thresholds_of_the_manifests() -> None:
    """The stored day was simulated with the numbers of the manifests, KEDA's included."""
    assert RESULTS.rule == manifest_rule(), AGAIN
    assert RESULTS.inputs == simulate.Inputs(), AGAIN
    (scaled,) = documents(KEDA)
    wait, busy = (one["metadata"] for one in scaled["spec"]["triggers"])
    assert float(wait["threshold"]) == RESULTS.rule.wait_seconds
    assert int(busy["value"]) / 100 == RESULTS.rule.busy
    assert scaled["spec"]["minReplicaCount"] == RESULTS.rule.least
    assert scaled["spec"]["maxReplicaCount"] == RESULTS.rule.most
    for one in render(DEPLOY / "kubernetes" / "overlays" / "cuda"):
        if one["kind"] == "HorizontalPodAutoscaler":
            wait, busy = (metric["pods"]["target"] for metric in one["spec"]["metrics"])
            assert wait["averageValue"] == f"{RESULTS.rule.wait_seconds * 1000:g}m"
            assert busy["averageValue"] == f"{RESULTS.rule.busy * 100:g}"


def test_thresholds_of_the_alerts() -> None:
    """The alerts about the line and about refusals fire at what the day was judged by."""
    path = DEPLOY / "prometheus" / "alerts.yml"
    if not path.exists():
        pytest.skip("deploy/prometheus is not there yet")
    (said,) = documents(path)
    rules = {rule["alert"]: rule["expr"] for group in said["groups"] for rule in group["rules"]}
    alerts = RESULTS.alerts
    congested = rules["InferenceQueueCongested"]
    assert f"instance:inference_queue_fill:ratio > {alerts.congested_fill:g}" in congested
    wait = f"instance:inference_queue_wait_seconds:p90_5m > {alerts.congested_wait_seconds:g}"
    assert wait in congested
    assert rules["InferenceRefusalsHigh"].strip().endswith(f"> {alerts.refused:g}")


def test_order_of_thresholds() -> None:
    """Replicas are added before anybody is told, and somebody is told before all are refused."""
    longest = _CAUTION * Settings(allowed_embedding_models=("any",)).queue_timeout_ms / 1000
    assert RESULTS.rule.wait_seconds < RESULTS.alerts.congested_wait_seconds < longest


def test_the_first_hours_again() -> None:
    """The simulation gives what is stored, to the last request."""
    seconds = simulate.SHORT_SECONDS
    past = simulate.day(RESULTS.inputs, simulate.MAIN, RESULTS.rule, seconds)
    again = simulate.summary(RESULTS.inputs, RESULTS.alerts, past)
    assert msgspec.structs.asdict(again) == pytest.approx(
        msgspec.structs.asdict(RESULTS.first_hours), rel=1e-6
    ), AGAIN


def test_table() -> None:
    """The capacity table is that of the JSON."""
    assert simulate.table(RESULTS) in simulate.README.read_text(), AGAIN


def test_both_numbers_beat_the_wait_alone() -> None:
    """What the manifest says of its two numbers."""
    both, alone = RESULTS.days["500 texts/s"], RESULTS.days["500 texts/s, by the wait alone"]
    assert both.dollars < alone.dollars
    assert both.congested_minutes < alone.congested_minutes


RULE = Rule(
    wait_seconds=0.25, busy=0.75, least=2, most=12, up_percent=100, up_seconds=60, down_pods=1,
    down_seconds=120, down_window=600,
)  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "ready", "wait", "busy", "wanted"),
    [
        (4, 4, 0.0, 0.75, 4),
        (4, 4, 0.0, 0.8, 4),  # within a tenth
        (4, 4, 0.0, 0.9, 5),
        (4, 4, 3.0, 0.9, 8),  # twice as many at most
        (8, 4, 0.4, 0.9, 8),  # as many start already
        (12, 12, 4.0, 1.0, 12),
        (2, 2, 0.0, 0.0, 2),
    ],
)
def test_autoscaler(replicas: int, ready: int, wait: float, busy: float, wanted: int) -> None:
    """As Kubernetes decides."""
    assert Autoscaler(RULE).decide(0, replicas, ready, wait, busy) == wanted


def test_autoscaler_takes_its_time_to_go_down() -> None:
    """Nothing goes for ten minutes, then one replica each two minutes."""
    scaler, replicas, at = Autoscaler(RULE), 6, {}
    scaler.decide(0, 6, 6, 0.0, 0.75)
    for now in range(15, 1200, 15):
        if (wanted := scaler.decide(now, replicas, replicas, 0.0, 0.1)) < replicas:
            replicas = at[now] = wanted
    assert next(iter(at)) == 615
    assert list(at.values()) == [5, 4, 3, 2]
    assert min(b - a for a, b in zip(at, list(at)[1:], strict=False)) == 120


def test_fleet_loses_nothing() -> None:
    """Every request is answered, refused for good, inside, or on its way back."""
    inputs = simulate.Inputs()
    fleet = Fleet(inputs.rates, replicas=2, start_seconds=60)
    sent = answered = given_up = 0.0
    for now in range(2000):
        new = 1000.0 if now < 30 else 0.0
        done, refused = fleet.second(now, new, 0.0)
        assert refused == 0
        sent, answered, given_up = sent + new, answered + done.answered, given_up + done.given_up
        assert done.waits[0][0] <= 4.0
    assert math.isclose(sent, answered + given_up, rel_tol=1e-9)
    assert 0 < given_up < sent
