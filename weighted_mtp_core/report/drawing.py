"""Small drawings as inline SVG: their colours come from the page's style sheet, so they suit light and dark.

Series differ by dashes and by a label at their end, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attrs import field, frozen
from markupsafe import Markup, escape

_MOST_POINTS = 200


@frozen(kw_only=True)
class Series:
    """One line of a chart; points (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]


@frozen(kw_only=True)
class Frame:
    """Where values lie within a drawing, in its own units."""

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
        """Return where a value is drawn."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step") -> Markup:
    """Draw lines over a common axis; nothing finite to draw gives an empty drawing."""
    drawn = [(each.label, _thin(each.points)) for each in series]
    finite = [(x, y) for _, points in drawn for x, y in points if math.isfinite(y)]
    if not finite:
        return Markup()
    ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    frame = Frame(
        x=(x_low, x_high if x_high > x_low else x_low + 1),
        y=(ticks[0], ticks[-1]),
        ticks=ticks,
        right=72.0 if len(series) > 1 else 12.0,
    )
    parts = [axes(frame, x_label=x_label)]
    ends = []
    for number, (label, points) in enumerate(drawn):
        style = f"s{number % 6 + 1}"
        parts.append(Markup('<path class="line {}" d="{}"/>').format(style, _path(frame, points)))
        parts += [_dot(frame, style, x, y, f"{label}: {y:.4g} at {x:g}") for x, y in points]
        last = [(x, y) for x, y in points if math.isfinite(y)]
        if last:
            ends.append((frame.at(*last[-1])[1], style, label))
    if len(series) > 1:
        parts += _end_labels(frame, ends)
    return drawing(frame, title, parts)


def bar_chart(bars: Sequence[tuple[str, float]], *, title: str) -> Markup:
    """Draw shares from 0 to 1 as labelled bars."""
    frame = Frame(x=(0, 1), y=(0, 1), height=26.0 * len(bars) + 12, left=92, top=6, bottom=6, right=60)
    parts: list[Markup] = []
    for number, (label, share) in enumerate(bars):
        top = frame.top + 26.0 * number
        start, end = frame.at(0, 0)[0], frame.at(share, 0)[0]
        parts.append(
            Markup(
                '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
                '<rect class="track" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="16" rx="3"/>'
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="16" rx="3"/>'
                '<text class="value" x="{:.1f}" y="{:.1f}">{:.1%}</text>'
            ).format(
                start - 8, top + 12.5, label, start, top, frame.at(1, 0)[0] - start,
                start, top, max(end - start, 0), frame.at(1, 0)[0] + 8, top + 12.5, share,
            )
        )  # fmt: skip
    return drawing(frame, title, parts)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return 3 to 8 round numbers, evenly spaced, from at most `low` to at least `high`."""
    if high <= low:
        room = abs(low) / 10 or 0.1
        low, high = low - room, high + room
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 2.5, 5, 10) if (high - low) / (step * times) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most 201 of the points, evenly chosen, the last one among them."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    if stride <= 1:
        return list(points)
    return [*points[:-1:stride], points[-1]]


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    """Return the line's path; what is not finite is a gap in it."""
    words, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            across, down = frame.at(x, y)
            words.append(f"{'L' if pen_down else 'M'}{across:.1f},{down:.1f}")
        pen_down = math.isfinite(y)
    return "".join(words)


def _dot(frame: Frame, style: str, x: float, y: float, text: str) -> Markup:
    if not math.isfinite(y):
        return Markup()
    across, down = frame.at(x, y)
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
        style, across, down, text
    )


def axes(frame: Frame, *, x_label: str) -> Markup:
    """Draw the grid, the numbers at both axes and the name of the lower one."""
    left, right = frame.left, frame.width - frame.right
    base = frame.height - frame.bottom
    parts = []
    for tick in frame.ticks:
        down = frame.at(frame.x[0], tick)[1]
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{:g}</text>'
            ).format(left, right, down, down, left - 7, down + 3.5, round(tick, 10))
        )
    for value, anchor in ((frame.x[0], "start"), (frame.x[1], "end")):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{:g}</text>').format(
                frame.at(value, 0)[0], base + 16, anchor, value
            )
        )
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
            (left + right) / 2, base + 16, x_label
        )
    )
    return Markup().join(parts)


def _end_labels(frame: Frame, ends: Sequence[tuple[float, str, str]]) -> list[Markup]:
    """Write each line's name beside its end, in the order of the ends, 13 units apart or more."""
    labels, free = [], frame.top
    room = frame.height - frame.bottom
    for number, (down, style, label) in enumerate(sorted(ends)):
        below = len(ends) - 1 - number
        place = min(max(down, free), room - 13 * below)
        free = place + 13
        labels.append(
            Markup('<text class="label {}" x="{:.1f}" y="{:.1f}">{}</text>').format(
                style, frame.width - frame.right + 7, place + 3.5, label
            )
        )
    return labels


def drawing(frame: Frame, title: str, parts: Sequence[Markup]) -> Markup:
    """Put parts into one drawing, which says its title to those who cannot see it."""
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}">{}</svg>').format(
        escape(title), frame.width, frame.height, Markup().join(parts)
    )
