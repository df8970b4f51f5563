"""The drawing that shows whether a critic's values mean what they say."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from weighted_mtp_core.report.drawing import Frame, axes, drawing
from weighted_mtp_core.report.token_report import Reliability


def reliability_chart(bins: Sequence[Reliability]) -> Markup:
    """Draw each bin's mean reward over its mean value, its interval and, by the dot's area, its size."""
    frame = Frame(x=(0, 1), y=(0, 1), ticks=(0, 0.25, 0.5, 0.75, 1), right=24.0, height=230.0)
    (left, base), (right, top) = frame.at(0, 0), frame.at(1, 1)
    parts = [
        axes(frame, x_label="value"),
        Markup('<line class="ideal" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            left, base, right, top
        ),
    ]
    largest = max(each.count for each in bins)
    for each in bins:
        across, middle = frame.at(min(max(each.value, 0.0), 1.0), each.reward)
        low, high = frame.at(0, max(each.low, 0.0))[1], frame.at(0, min(each.high, 1.0))[1]
        words = f"{each.count} responses, mean value {each.value:.3f}, right {each.reward:.1%}"
        parts.append(
            Markup(
                '<line class="whisker" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<circle class="point" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>'
            ).format(across, across, low, high, across, middle, 3 + 6 * (each.count / largest) ** 0.5, words)
        )
    return drawing(frame, "Share of right responses by value", parts)
