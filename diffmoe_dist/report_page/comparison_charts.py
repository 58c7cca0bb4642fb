"""Charts of several runs: told apart by colour, dash and marker, and by a letter at the end of each line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from diffmoe_dist.report_page import figures
from diffmoe_dist.report_page.comparison import digits

# After Okabe and Ito, without what is too light for white paper: each has a contrast of 3 to 1 and more.
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a23b8c", "#1c1f24", "#8a6a00")
DASHES = ((), (5, 1.6), (1.6, 1.4), (6, 1.4, 1.4, 1.4))
MARKERS = ("o", "s", "^", "D", "v", "P")
AXIS_LABELS = {
    "step": "steps", "images_seen": "images seen", "training_flops": "activated training FLOPs",
    "device_hours": "device-hours",
}  # fmt: skip
SIZE = (3.9, 2.9)  # inches: on a telephone about its own size, so that letters stay letters
MOST_POINTS = 400  # of a line; more are thinned
_FEW = 40
_SKIPPED = 0.05  # of a curve's begin, which does not decide the range that is shown
_BESIDE = 0.08  # of the chart's width: letters that are closer must not have one height
_LOWEST = 0.04
_GAP = 0.075  # between letters at the ends of lines, in heights of the chart


@dataclass(frozen=True)
class Line:
    letter: str
    style: int  # the number of its group
    x_N: np.ndarray
    y_N: np.ndarray
    raw_N: np.ndarray | None = None  # drawn thinly behind


@dataclass(frozen=True)
class Style:
    colour: str
    dash: tuple[float, ...]
    marker: str

    @staticmethod
    def of(group: int) -> Style:
        """The first twelve are different in colour and dash, as are the markers of neighbours."""
        dash = DASHES[(group + group // len(COLOURS)) % len(DASHES)]
        return Style(COLOURS[group % len(COLOURS)], dash, MARKERS[group % len(MARKERS)])


def line_chart(
    lines: Sequence[Line], axis: str, ylabel: str, *, zero: bool = False, every_point: bool = False
) -> Figure:
    """
    Args:
        zero: a line at 0, for differences.
        every_point: a marker on each where they are few; else on some of each line.
    """
    every_point = every_point and max(len(line.x_N) for line in lines) <= _FEW

    def draw(axes: Axes) -> None:
        if zero:
            axes.axhline(0, color="#5b616b", linewidth=1)
        for line in lines:
            _draw_line(axes, line, every_point)
        axes.set(xlabel=AXIS_LABELS[axis], ylabel=ylabel, xlim=(0, _far(lines) * 1.07))
        axes.set_ylim(*_range(lines, every_point, zero))
        _ticks(axes, is_log=not zero and _is_wide(axes.get_ylim()))
        axes.grid(alpha=0.25)
        _letters(axes, lines)

    return figures.one_panel(draw, SIZE)


def _draw_line(axes: Axes, line: Line, every_point: bool) -> None:
    style = Style.of(line.style)
    if line.raw_N is not None:
        axes.plot(*_thinned(line.x_N, line.raw_N), color=style.colour, linewidth=0.7, alpha=0.3)
    x_N, y_N = _thinned(line.x_N, line.y_N)
    apart = 1 if every_point else max(1, len(x_N) // 5)
    axes.plot(
        x_N, y_N, color=style.colour, dashes=style.dash, marker=style.marker, markersize=5 if every_point else 4.5,
        markevery=(0 if every_point else min(len(x_N) - 1, apart // 2 + line.style % max(apart // 2, 1)), apart),
    )  # fmt: skip


def _thinned(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, each the mean of those that it stands for."""
    parts = min(len(x_N), MOST_POINTS)
    edges = np.linspace(0, len(x_N), parts + 1).astype(int)
    widths = np.diff(edges)
    return np.add.reduceat(x_N, edges[:-1]) / widths, np.add.reduceat(y_N, edges[:-1]) / widths


def _far(lines: Sequence[Line]) -> float:
    return max(float(line.x_N[-1]) for line in lines)


def _range(lines: Sequence[Line], every_point: bool, zero: bool) -> tuple[float, float]:
    """What the curves take up after their begin, which would else press the rest flat."""
    begin = 0.0 if every_point else _SKIPPED * _far(lines)
    drawn = [_thinned(line.x_N, line.y_N) for line in lines]
    shown = [y_N[x_N >= min(begin, x_N[-1])] for x_N, y_N in drawn]
    low, high = min(float(y.min()) for y in shown), max(float(y.max()) for y in shown)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - margin
    return (bottom if low <= 0 or bottom > 0 else low * 0.9), high + margin


def _is_wide(limits: tuple[float, float]) -> bool:
    return limits[0] > 0 and limits[1] / limits[0] > 4


def _ticks(axes: Axes, is_log: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """12 k for 12000, and 0 for what rounding has left of it."""
    return "0" if abs(value) < 1e-12 else digits(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _letters(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line's letter behind its end; where ends are close, pushed apart and tied to them."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.x_N[-1], line.y_N[-1])) for line in lines]
    heights = spread_apart([(float(x), float(np.clip(y, 0.02, 0.98))) for x, y in ends])
    for line, (x, y), height in zip(lines, ends, heights, strict=True):
        tie = {"arrowstyle": "-", "color": Style.of(line.style).colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            line.letter, (x, y), (x + 0.025, height), xycoords="axes fraction", textcoords="axes fraction",
            color=Style.of(line.style).colour, fontweight="bold", fontsize=11, va="center", annotation_clip=False,
            arrowprops=tie if abs(height - y) > 0.02 else None,
        )  # fmt: skip


def spread_apart(points: Sequence[tuple[float, float]]) -> list[float]:
    """Heights near those of the points, so far from each other that letters beside them can be read."""
    heights = [y for _, y in points]
    order = sorted(range(len(points)), key=lambda place: heights[place])
    for _ in range(60):
        moved = False
        for at, lower in enumerate(order):
            for upper in order[at + 1 :]:
                if abs(points[lower][0] - points[upper][0]) > _BESIDE:
                    continue
                lacking = _GAP - (heights[upper] - heights[lower])
                if lacking > 1e-3:
                    heights[lower] -= lacking / 2
                    heights[upper] += lacking / 2
                    moved = True
        if not moved:
            break
    for at, place in enumerate(order):  # not below the axis, where numbers stand
        beside = [low for low in order[:at] if abs(points[low][0] - points[place][0]) <= _BESIDE]
        heights[place] = max([heights[place], _LOWEST, *(heights[low] + _GAP for low in beside)])
    return heights


def swatch(group: int) -> str:
    """A run's line as a small SVG, for a legend in HTML."""
    style = Style.of(group)
    dashes = f' stroke-dasharray="{" ".join(f"{2 * part:g}" for part in style.dash)}"' if style.dash else ""
    shapes = {
        "o": '<circle cx="17" cy="6" r="4"/>',
        "s": '<rect x="13.4" y="2.4" width="7.2" height="7.2"/>',
        "^": '<path d="M17 1.4l4.4 8h-8.8z"/>',
        "D": '<path d="M17 1l5 5-5 5-5-5z"/>',
        "v": '<path d="M17 10.6l4.4-8h-8.8z"/>',
        "P": '<path d="M15.4 2h3.2v2.4H21v3.2h-2.4V10h-3.2V7.6H13V4.4h2.4z"/>',
    }
    return (
        f'<svg width="34" height="12" viewBox="0 0 34 12" aria-hidden="true" fill="{style.colour}"><path '
        f'd="M0 6h34" fill="none" stroke="{style.colour}" stroke-width="2.4"{dashes}/>{shapes[style.marker]}</svg>'
    )
