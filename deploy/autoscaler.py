"""The rule of deploy/kubernetes/base/horizontalpodautoscaler.yaml, as Kubernetes follows it.

Kubernetes' documents, "Horizontal Pod Autoscaling", section "Algorithm details": per metric
`ceil(pods * value / target)`, nothing within a tenth of the target, pods that are not ready count
as 0 where that means fewer new ones, the largest answer counts, then the policies of `behavior`.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import yaml

MANIFEST = Path(__file__).parent / "kubernetes" / "base" / "horizontalpodautoscaler.yaml"
SYNC_SECONDS = 15
"""How often it looks: the controller manager's default."""
_TOLERANCE = 0.1


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the manifest."""

    wait_seconds: float
    """Target of the 90th percentile of the wait in line."""
    busy: float | None
    """Target of the cores' use, of what was asked for; None = only the wait counts."""
    least: int
    most: int
    up_percent: int
    up_seconds: int
    down_pods: int
    down_seconds: int
    down_window: int


def manifest_rule(path: Path = MANIFEST) -> Rule:
    """The rule that a manifest states."""
    spec = yaml.safe_load(path.read_text())["spec"]
    (wait,) = [one["pods"]["target"] for one in spec["metrics"] if one["type"] == "Pods"]
    (busy,) = [one["resource"]["target"] for one in spec["metrics"] if one["type"] == "Resource"]
    behavior = spec["behavior"]
    up, down = _policy(behavior["scaleUp"], "Percent"), _policy(behavior["scaleDown"], "Pods")
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    return Rule(
        wait_seconds=int(wait["averageValue"].removesuffix("m")) / 1000,
        busy=busy["averageUtilization"] / 100,
        least=spec["minReplicas"],
        most=spec["maxReplicas"],
        up_percent=up["value"],
        up_seconds=up["periodSeconds"],
        down_pods=down["value"],
        down_seconds=down["periodSeconds"],
        down_window=behavior["scaleDown"]["stabilizationWindowSeconds"],
    )


def _policy(behavior: dict[str, Any], kind: str) -> dict[str, Any]:
    (policy,) = behavior["policies"]
    assert policy["type"] == kind
    return dict(policy)


class Autoscaler:
    """One autoscaler's memory: what it recommended and what it did lately."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._wanted: deque[tuple[int, int]] = deque()
        self._changes: deque[tuple[int, int]] = deque()

    def decide(self, now: int, replicas: int, ready: int, wait: float, busy: float) -> int:
        """How many replicas there are to be.

        Args:
            now: seconds.
            replicas: how many there are.
            ready: how many of them serve.
            wait: the 90th percentile of a pod's waits, seconds.
            busy: use of the cores that pods asked for.
        """
        rule = self._rule
        wanted = _wanted(replicas, ready, wait / rule.wait_seconds)
        if rule.busy:
            wanted = max(wanted, _wanted(replicas, ready, busy / rule.busy))
        wanted = min(max(wanted, rule.least), rule.most)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - rule.down_window:
            self._wanted.popleft()
        if wanted < replicas:
            wanted = min(replicas, max(one for _, one in self._wanted))
        return self._paced(now, replicas, wanted)

    def _paced(self, now: int, replicas: int, wanted: int) -> int:
        rule = self._rule
        while self._changes and self._changes[0][0] <= now - max(
            rule.up_seconds, rule.down_seconds
        ):
            self._changes.popleft()
        if wanted > replicas:
            before = replicas - self._lately(now - rule.up_seconds, 1)
            wanted = min(wanted, math.ceil(before * (1 + rule.up_percent / 100)))
        elif wanted < replicas:
            before = replicas - self._lately(now - rule.down_seconds, -1)
            wanted = max(wanted, before - rule.down_pods)
        if wanted != replicas:
            self._changes.append((now, wanted - replicas))
        return wanted

    def _lately(self, since: int, sign: int) -> int:
        return sum(by for when, by in self._changes if when > since and by * sign > 0)


def _wanted(replicas: int, ready: int, ratio: float) -> int:
    if abs(ratio - 1) <= _TOLERANCE or not ready:
        return replicas
    if ratio > 1 and ready < replicas:
        ratio *= ready / replicas
        return replicas if ratio <= 1 + _TOLERANCE else math.ceil(ratio * replicas)
    return math.ceil(ratio * ready)
