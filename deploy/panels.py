"""What `deploy/grafana/panels.yml` says, and the comparisons of alerts that its panels show."""

import math
import re
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
import yaml

GRAFANA = Path(__file__).parent / "grafana"
_ALERTS = Path(__file__).parent / "prometheus" / "alerts.yml"


class Quantiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Queries of a histogram; `ends` are percents."""

    of: str
    ends: tuple[int, ...]
    by: str = ""

    def queries(self) -> dict[str, str]:
        """Legends -> PromQL."""
        metric, brace, matchers = self.of.partition("{")
        labels, legend = (f"{self.by}, le", f" {{{{{self.by}}}}}") if self.by else ("le", "")
        inside = f"sum by ({labels}) (rate({metric}_bucket{brace}{matchers}[w]))"
        return {
            f"p{end}{legend}": f"histogram_quantile({end / 100}, {inside})" for end in self.ends
        }


class Panel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One panel."""

    title: str
    about: str
    queries: dict[str, str] = {}
    """Legends -> PromQL; or `quantiles`."""
    quantiles: Quantiles | None = None
    unit: str = "short"
    """One of Grafana's; `suffix:x` appends x."""
    kind: Literal["stat", "timeseries", "state-timeline", "table"] = "timeseries"
    width: int = 8
    """Of 24."""
    height: int = 8
    stacked: bool = False
    limit: float | None = None
    """Where a line is, if no alert draws one."""
    most: float | None = None
    names: dict[int, str] = {}
    """What numbers are shown as."""
    nothing: str = ""
    """What is said where there is no data."""

    @property
    def asked(self) -> dict[str, str]:
        """All queries."""
        return self.quantiles.queries() if self.quantiles else self.queries


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One dashboard; `name` is its file's."""

    name: str
    title: str
    about: str
    panels: list[Panel]


class Limit(msgspec.Struct, frozen=True):
    """What an alert compares, with what."""

    alert: str
    severity: str
    left: str
    above: bool
    right: float


def pages() -> list[Page]:
    """All dashboards."""
    return msgspec.yaml.decode((GRAFANA / "panels.yml").read_bytes(), type=list[Page])


@cache
def limits() -> list[Limit]:
    """Every comparison with a number that an alert makes, by `<` or `>`."""
    found = []
    groups = yaml.safe_load(_ALERTS.read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        for part in re.split(r"\b(?:and|or|unless)\b", rule["expr"]):
            if said := re.fullmatch(r"[\s(]*(\S.*?) ([<>]) ([\d.* ]+)[\s)]*", part, re.DOTALL):
                right = round(math.prod(map(float, said[3].split("*"))), 9)
                severity = rule["labels"]["severity"]
                found.append(Limit(rule["alert"], severity, said[1], said[2] == ">", right))
    return found


def shown(panel: Panel) -> list[Limit]:
    """Comparisons of what a panel shows, the lowest first."""
    asked = " ".join(panel.asked.values())
    found = [one for one in limits() if one.left in asked]
    return sorted(found, key=lambda one: one.right)
