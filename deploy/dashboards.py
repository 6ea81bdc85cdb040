"""`python -m deploy.dashboards`: Grafana's dashboards, made of `deploy/grafana/panels.yml`.

A panel gets its place, the filters of the variables, and the lines of the alerts that look at what
it shows, with their numbers from `deploy/prometheus/alerts.yml`. A test compares the JSON that is
kept with what this makes. The schema is Grafana's classic one.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from deploy.panels import GRAFANA, Page, Panel, pages, shown
from embedding_server.observability.metrics import Metrics

Object = dict[str, Any]
_TAG = "embedding-server"
_SCHEMA = 39
"""Grafana 11's; later ones read it, too."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_SEVERITIES = {"warning": "orange", "critical": "red"}
_STATES = {
    "ready": "green",
    "not ready": "red",
    "draining": "orange",
    "no": "green",
    "yes": "orange",
}
_OPTIONS: dict[str, Object] = {
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "reduceOptions": {"calcs": ["lastNotNull"]},
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "state-timeline": {"legend": {"showLegend": False}, "showValue": "auto", "mergeValues": True},
    "table": {"showHeader": True},
}


def _labels() -> dict[str, set[str]]:
    instruments = [one for one in vars(Metrics("")).values() if hasattr(one, "_labelnames")]
    return {one.describe()[0].name: {*one._labelnames} for one in instruments}  # noqa: SLF001


_LABELS = _labels()
_FILTERS = {"job": 'job="$job"', "instance": 'instance=~"$instance"', "model": 'model=~"$model"'}


def _filters(series: str) -> list[str]:
    """Matchers of the variables, as far as a series has their labels."""
    if series == "ALERTS":
        labels = {"job"}  # those about objectives have no instance
    elif ":" in series:  # a rule's name begins with its labels
        labels = {"job", *series.partition(":")[0].split("_")}
    else:
        family = re.sub(r"_(total|bucket|sum|count)$", "", series)
        labels = {"job", "instance"} | _LABELS.get(series, _LABELS.get(family, set()))
    return [matcher for label, matcher in _FILTERS.items() if label in labels]


def _filtered(expression: str) -> str:
    """An expression as Grafana is to ask it."""

    def put(found: re.Match[str]) -> str:
        own = [found[2]] if found[2] else []
        return f"{found[1]}{{{', '.join(_filters(found[1]) + own)}}}"

    series = r"\b(\w+:inference_[\w:]+|(?:inference|gpu|process)_\w+|up|ALERTS)\b(?:\{([^}]*)\})?"
    return re.sub(series, put, expression).replace("[w]", "[$__rate_interval]")


def _steps(panel: Panel) -> list[Object]:
    """Colours from the lowest value up."""
    steps: dict[float | None, str] = {None: "green"}
    for one in shown(panel):
        if not one.right:  # a line at 0 says nothing
            continue
        colour = _SEVERITIES[one.severity]
        if one.above:
            steps[one.right] = colour
        else:
            steps |= {None: colour, one.right: "green"}
    if panel.limit is not None:
        steps[panel.limit] = "orange"
    return [{"value": value, "color": colour} for value, colour in steps.items()]


def _field(panel: Panel) -> Object:
    """Unit, colours and style of what a panel shows."""
    steps = _steps(panel)
    field: Object = {"unit": panel.unit, "color": {"mode": "thresholds"}}
    field["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "timeseries":
        field |= {"min": 0, "color": {"mode": "palette-classic"}}
        field["custom"] = {
            "fillOpacity": 30 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if len(steps) > 1 else "off"},
        }
    elif len(steps) == 1 and not panel.names:
        field["color"] = {"mode": "fixed", "fixedColor": "blue"}
    if panel.most is not None:
        field["max"] = panel.most
    if panel.nothing:
        field["noValue"] = panel.nothing
    if panel.names:
        named = {
            str(value): {"text": text, "color": _STATES[text], "index": at}
            for at, (value, text) in enumerate(panel.names.items())
        }
        field["mappings"] = [{"type": "value", "options": named}]
    return field


def _target(number: int, panel: Panel, legend: str, expression: str) -> Object:
    table = panel.kind == "table"
    return {
        "refId": chr(ord("A") + number),
        "datasource": _SOURCE,
        "expr": _filtered(expression),
        "legendFormat": legend,
        "range": not table,
        "instant": table,
        "format": "table" if table else "time_series",
    }


def _about(panel: Panel) -> str:
    """What a panel is about, and which alerts look at it."""
    comparisons = [
        f"{one.alert} {'above' if one.above else 'below'} {one.right:.4g}" for one in shown(panel)
    ]
    alerts = ", ".join(dict.fromkeys(comparisons))
    return f"{panel.about}\n\nAlerts: {alerts}." if alerts else panel.about


def _places(panels: list[Panel]) -> Iterator[Object]:
    """From left to right; a panel that does not fit begins a new row."""
    x = y = height = 0
    for panel in panels:
        if x + panel.width > _COLUMNS:
            x, y, height = 0, y + height, 0
        height = max(height, panel.height)
        yield {"x": x, "y": y, "w": panel.width, "h": panel.height}
        x += panel.width


def _panel(number: int, panel: Panel, place: Object) -> Object:
    made = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": _about(panel),
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(at, panel, *said) for at, said in enumerate(panel.asked.items())],
    }
    if panel.kind == "table":
        options = {"excludeByName": {"Time": True}, "renameByName": {"Value": "instances"}}
        made["transformations"] = [{"id": "organize", "options": options}]
    return made


def _variable(name: str, of: str) -> Object:
    query = f"label_values({of}, {name})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor"},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
    }


_MANY = {
    "multi": True,
    "includeAll": True,
    "allValue": ".*",  # also series without the label
    "current": {"text": "All", "value": "$__all"},
}
_VARIABLES = [
    {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"},
    _variable("job", "inference_ready") | {"current": {"text": _TAG, "value": _TAG}},
    _variable("instance", 'inference_ready{job="$job"}') | _MANY,
    _variable("model", 'inference_model_ready{job="$job"}') | _MANY,
]


def _annotation(name: str, expression: str, colour: str, title: str) -> Object:
    return {
        "name": name,
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": colour,
        "target": {"refId": "A", "expr": _filtered(expression), "interval": "60s"},
        "titleFormat": title,
        "textFormat": "{{instance}} {{model}}",
    }


_FIRING = 'ALERTS{alertname=~"Inference.+", alertstate="firing"}'
_ANNOTATIONS = [
    _annotation("alerts", _FIRING, "red", "{{alertname}}"),
    _annotation("starts", "changes(process_start_time_seconds[1m]) > 0", "blue", "started"),
]


def dashboard(page: Page) -> Object:
    """A page as Grafana takes it."""
    link = {"type": "dashboards", "title": _TAG, "tags": [_TAG], "asDropdown": False}
    return {
        "uid": f"{_TAG}-{page.name}",
        "title": page.title,
        "description": page.about,
        "tags": [_TAG],
        "schemaVersion": _SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "timezone": "browser",
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "links": [link | {"includeVars": True, "keepTime": True, "targetBlank": False}],
        "templating": {"list": _VARIABLES},
        "annotations": {"list": _ANNOTATIONS},
        "panels": [
            _panel(number, panel, place)
            for number, (panel, place) in enumerate(
                zip(page.panels, _places(page.panels), strict=True), 1
            )
        ],
    }


def written(made: Object) -> str:
    """A line for every panel and every other field: differences stay readable, files small."""

    def line(value: Any) -> str:
        return msgspec.json.encode(value).decode()

    panels = ",\n  ".join(map(line, made["panels"]))
    fields = [f"{line(key)}: {line(value)}" for key, value in made.items() if key != "panels"]
    return "{\n " + ",\n ".join([*fields, f'"panels": [\n  {panels}\n ]']) + "\n}\n"


def subject(made: Object) -> str:
    """What a picture of a dashboard is of: titles and units."""
    return "; ".join(
        f"{panel['title']} ({panel['fieldConfig']['defaults']['unit']})" for panel in made["panels"]
    )


def files() -> dict[Path, str]:
    """What each file is to hold."""
    return {GRAFANA / f"{page.name}.json": written(dashboard(page)) for page in pages()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
