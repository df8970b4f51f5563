"""Draws small charts as inline SVG with colours from the page's style sheet, for light and dark mode.

Up to six lines differ in colours and dashes, and each of several lines has a label at its end. matplotlib is
not used, because it cannot use a style sheet and takes 2.4 s of CPU time for the 32 charts of a run; this
module takes 0.05 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attrs import field, frozen
from markupsafe import Markup

from weighted_mtp_core.metrics.critic_report import ReliabilityBin
from weighted_mtp_core.report.rendering import render

_MOST_POINTS = 200
_TINY = 1e-300  # a smaller range of values counts as 0, because powers of ten would underflow


@frozen(kw_only=True)
class Series:
    """One line of a chart; its points (x, y) are in order of x."""

    label: str
    points: Sequence[tuple[float, float]]


@frozen(kw_only=True)
class _Frame:
    """Maps values to positions in a drawing, in SVG units."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 360.0
    height: float = 210.0
    left: float = 44.0
    right: float = 72.0
    top: float = 14.0
    bottom: float = 30.0
    ticks: Sequence[float] = field(factory=tuple)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of the values (x, y), in SVG units from the top left corner."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step") -> Markup:
    """Draw lines in one chart; the result is empty if no value is finite."""
    drawn = [(each.label, _thin(each.points)) for each in series]
    finite = [(x, y) for _, points in drawn for x, y in points if math.isfinite(y)]
    if not finite:
        return Markup()
    ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    frame = _Frame(
        x=(x_low, x_high if x_high > x_low else x_low + 1),
        y=(ticks[0], ticks[-1]),
        ticks=ticks,
        right=72.0 if len(series) > 1 else 12.0,
    )
    lines, ends = [], []
    for number, (label, points) in enumerate(drawn):
        style = f"s{number % 6 + 1}"
        seen = [(x, y) for x, y in points if math.isfinite(y)]
        dots = [(*frame.at(x, y), f"{label}: {y:.4g} at {x:g}") for x, y in seen]
        lines.append((style, _path(frame, points), dots))
        if dots and len(series) > 1:
            ends.append((dots[-1][1], style, label))
    labels = _end_labels(frame, ends)
    return render("chart.svg.j2", frame=frame, title=title, x_label=x_label, lines=lines, labels=labels)


def reliability_chart(bins: Sequence[ReliabilityBin]) -> Markup:
    """Plot each bin's mean reward and interval over its mean value; larger dots have more responses."""
    frame = _Frame(x=(0, 1), y=(0, 1), ticks=(0, 0.25, 0.5, 0.75, 1), right=24.0, height=230.0)
    largest = max(each.count for each in bins)
    points = []
    for each in bins:
        across, middle = frame.at(min(max(each.value, 0.0), 1.0), each.reward)
        low, high = frame.at(0, max(each.low, 0.0))[1], frame.at(0, min(each.high, 1.0))[1]
        text = f"{each.count} responses, mean value {each.value:.3f}, correct {each.reward:.1%}"
        points.append((across, low, middle, high, 3 + 6 * (each.count / largest) ** 0.5, text))
    title = "Share of correct responses by value"
    return render("chart.svg.j2", frame=frame, title=title, x_label="value", diagonal=True, points=points)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return 4 to 7 evenly spaced round numbers; the first is at most `low`, the last at least `high`."""
    if high - low <= _TINY:
        margin = abs(low) / 10 if abs(low) > _TINY else 0.1
        low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 2.5, 5, 10) if (high - low) / (step * times) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most 201 of the points, evenly spaced and including the last point."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    if stride <= 1:
        return list(points)
    return [*points[:-1:stride], points[-1]]


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    """Return the path of a line, with a gap where values are not finite."""
    words, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            across, down = frame.at(x, y)
            words.append(f"{'L' if pen_down else 'M'}{across:.1f},{down:.1f}")
        pen_down = math.isfinite(y)
    return "".join(words)


def _end_labels(frame: _Frame, ends: Sequence[tuple[float, str, str]]) -> list[tuple[str, float, str]]:
    """Return labels next to the ends of the lines, sorted by position and at least 13 SVG units apart."""
    labels, free = [], frame.top
    bottom = frame.height - frame.bottom
    for number, (down, style, label) in enumerate(sorted(ends)):
        below = len(ends) - 1 - number
        at = min(max(down, free), bottom - 13 * below)
        free = at + 13
        labels.append((style, at, label))
    return labels
