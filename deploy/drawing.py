"""Draws a dashboard's panels as Grafana would roughly show them, from what Prometheus answered."""

import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deploy.dashboards import Object, subject

_WIDTH, _UNIT, _HEAD, _FOOT = 13.0, 0.25, 0.62, 0.08
"""Inches: the page, a row of the grid, what is above and below it."""
_GAP, _LEFT, _RIGHT, _TOP, _BOTTOM = 0.06, 0.62, 0.14, 0.34, 0.44
_DPI, _COLOURS = 100, 64
_PALETTE = ("#3f8f4f", "#d9a400", "#3274c9", "#e0752d", "#c4162a", "#8f3bb8", "#2b9c9c", "#7a6a58")
_NAMED = {"green": "#3f8f4f", "orange": "#e8830c", "red": "#d0243c", "blue": "#3274c9"}
_INK, _FAINT, _PAGE = "#24292e", "#d8dbe0", "#f1f2f4"


class Line(msgspec.Struct, frozen=True):
    """One series: seconds since the start, and values; NaN where there are none."""

    legend: str
    times: Sequence[float]
    values: Sequence[float]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"


_UNITS: dict[str, Callable[[float], str]] = {
    "bytes": lambda value: f"{value:,.0f} MiB",
    "s": _seconds,
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "percent": lambda value: f"{value:.3g} %",
    "short": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
}
_DIVISORS = {"bytes": 2**20}
"""What values are divided by first, so that ticks are round numbers."""


def _word(unit: str) -> str:
    """What stands behind the title rather than behind each number."""
    return "req/s" if unit == "reqps" else unit.partition("suffix:")[2]


def _shown(unit: str, value: float) -> str:
    return _UNITS.get(unit, _UNITS["short"])(value)


def draw(dashboard: Object, answers: dict[int, list[Line]], caption: str, path: Path) -> None:
    """The page, as a PNG; `answers` are those to each panel's queries, by its id."""
    mpl.rcParams.update({"font.size": 8, "text.color": _INK, "axes.labelcolor": _INK})
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    height = _HEAD + rows * _UNIT + _FOOT
    figure = Figure(figsize=(_WIDTH, height), facecolor=_PAGE)
    figure.text(0.012, 1 - 0.22 / height, dashboard["title"], size=14, weight="bold", va="center")
    figure.text(0.012, 1 - 0.46 / height, caption, size=8.5, color="#57606a", va="center")
    for panel in dashboard["panels"]:
        _card(figure, height, panel, answers[panel["id"]])
    buffer = BytesIO()
    figure.savefig(buffer, dpi=_DPI)
    with Image.open(buffer) as pixels:
        few = pixels.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    said = PngInfo()
    said.add_text("Description", subject(dashboard))
    few.save(path, optimize=True, pnginfo=said)


def _card(figure: Figure, height: float, panel: Object, lines: list[Line]) -> None:
    """A panel's frame, title and inside."""
    at, column = panel["gridPos"], (_WIDTH - 2 * _GAP) / 24
    left, width = _GAP + at["x"] * column, at["w"] * column
    top, tall = height - _HEAD - at["y"] * _UNIT, at["h"] * _UNIT
    box = (left + _GAP / 2, top - tall + _GAP / 2, width - _GAP, tall - _GAP)
    scale = (_WIDTH, height, _WIDTH, height)
    x, y, w, h = (size / of for size, of in zip(box, scale, strict=True))
    frame = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.002", mutation_aspect=_WIDTH / height,
        facecolor="white", edgecolor=_FAINT, linewidth=0.8, transform=figure.transFigure, zorder=-1,
    )  # fmt: skip
    figure.patches.append(frame)
    word = _word(panel["fieldConfig"]["defaults"]["unit"])
    title = f"{panel['title']}, {word}" if word else panel["title"]
    figure.text(x + 0.1 / _WIDTH, y + h - 0.16 / height, title, weight="bold", va="center")
    _KINDS[panel["type"]](figure, height, panel, lines, (x, y, w, h))


Box = tuple[float, float, float, float]


def _inside(figure: Figure, height: float, box: Box, bottom: float, left: float) -> Axes:
    x, y, w, h = box
    axes = figure.add_axes(
        (
            x + left / _WIDTH,
            y + bottom / height,
            w - (left + _RIGHT) / _WIDTH,
            h - (bottom + _TOP) / height,
        )
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7, colors="#57606a")
    return axes


def _steps(panel: Object) -> list[Object]:
    steps: list[Object] = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return steps


def _stat(figure: Figure, height: float, panel: Object, lines: list[Line], box: Box) -> None:
    """The last values, large, before a faint curve."""
    field = panel["fieldConfig"]["defaults"]
    axes = _inside(figure, height, box, 0.04, 0.04)
    axes.set_axis_off()
    for number, line in enumerate(lines):
        numbers = [value for value in line.values if not math.isnan(value)]
        last = numbers[-1]
        colour = (
            field["color"].get("fixedColor")
            or [
                step["color"]
                for step in _steps(panel)
                if step["value"] is None or last >= step["value"]
            ][-1]
        )
        middle = (number + 0.5) / len(lines)
        text = _shown(field["unit"], last)
        size = 21 if len(lines) == 1 else 17
        axes.text(
            middle, 0.55, text, size=size, weight="bold", color=_NAMED[colour],
            ha="center", va="center", transform=axes.transAxes,
        )  # fmt: skip
        if len(lines) > 1:
            axes.text(middle, 0.12, line.legend, ha="center", transform=axes.transAxes)
        else:
            axes.fill_between(line.times, line.values, color=_NAMED[colour], alpha=0.15, lw=0)
            axes.set_ylim(0, 2.2 * max(*numbers, 1e-9))
            axes.margins(x=0)


def _timeline(figure: Figure, height: float, panel: Object, lines: list[Line], box: Box) -> None:
    """A bar per series, in the colours of its states."""
    states = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    axes = _inside(figure, height, box, 0.26, 0.75)
    for row, line in enumerate(lines):
        step = line.times[1] - line.times[0]
        spans = groupby(zip(line.times, line.values, strict=True), lambda seen: str(seen[1]))
        for seen in (list(span) for _, span in spans):
            start, value = seen[0]
            if math.isnan(value):
                continue
            state, length = states[f"{value:.0f}"], len(seen) * step
            axes.broken_barh(
                [(start, length)], (row - 0.38, 0.76), color=_NAMED[state["color"]], alpha=0.8
            )
            axes.text(
                start + length / 2, row, state["text"], color="white", ha="center", va="center"
            )
    axes.set_yticks(range(len(lines)), [line.legend for line in lines])
    _minutes(axes, lines)


def _minutes(axes: Axes, lines: list[Line]) -> None:
    axes.set_xlim(0, max(line.times[-1] for line in lines))
    axes.set_xticks(np.arange(0, axes.get_xlim()[1] + 1, 30))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}")
    )


def _curves(figure: Figure, height: float, panel: Object, lines: list[Line], box: Box) -> None:
    """Curves, or areas on one another, with the lines of alerts."""
    field = panel["fieldConfig"]["defaults"]
    axes = _inside(figure, height, box, _BOTTOM, _LEFT)
    axes.grid(visible=True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    below = np.zeros(len(lines[0].times))
    stacked = field["custom"]["stacking"]["mode"] == "normal"
    for line, colour in zip(lines, _PALETTE * 2, strict=False):
        values = np.array(line.values) / _DIVISORS.get(field["unit"], 1)
        if stacked:
            values = below + np.nan_to_num(values)
            axes.fill_between(line.times, below, values, color=colour, alpha=0.3, lw=0)
            below = values
        axes.plot(line.times, values, color=colour, linewidth=1.3, label=line.legend)
    _scale(axes, field, stacked=stacked)
    for step in _steps(panel)[1:] if field["custom"]["thresholdsStyle"]["mode"] != "off" else []:
        if step["value"] < axes.get_ylim()[1]:
            axes.axhline(step["value"], color=_NAMED[step["color"]], ls=(0, (5, 3)), lw=1.1)
    _minutes(axes, lines)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=6, frameon=False, fontsize=7,
        handlelength=1.1, handletextpad=0.5, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip


def _scale(axes: Axes, field: Object, *, stacked: bool) -> None:
    """From 0 to a little above the highest value, or to the panel's own end."""
    highest = max(np.nanmax(np.append(line.get_ydata(), 0)) for line in axes.get_lines())
    axes.set_ylim(0, field.get("max", 1.12 * highest or 1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=field["unit"] == "short" and not stacked))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _shown(field["unit"], value)))


_KINDS: dict[str, Callable[[Figure, float, Object, list[Line], Box], None]] = {
    "stat": _stat,
    "timeseries": _curves,
    "state-timeline": _timeline,
}


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend with its labels' values."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)
