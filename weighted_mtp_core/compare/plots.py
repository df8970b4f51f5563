"""Draws learning curves of the arms with 95 % intervals, as SVG. This module imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weighted_mtp_core.compare.measures import RunMeasures
from weighted_mtp_core.metrics.statistics import Estimate, estimate

# Okabe and Ito's colours, which most colour-blind people can distinguish; lines also differ in dashes and
# markers.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
_MARKERS = "osD^vX*"


def plot_curves(
    runs: Mapping[str, Mapping[int, RunMeasures]], metrics: Sequence[str], folder: Path
) -> list[Path]:
    """Draw each metric in two parts, all of stage 2 and its second half: mean and 95 % interval of each arm.

    Args:
        runs: Measures by arm and seed.
        metrics: The metrics to draw. A metric is skipped if it is not a curve in every run, or if the runs
            of an arm have no step in common.
        folder: Folder for the files `<metric>.svg`.

    Returns:
        The files.
    """
    everything = [run for by_seed in runs.values() for run in by_seed.values()]
    files = []
    for metric in metrics:
        if not all(metric in run.curves for run in everything):
            continue
        bands = {arm: _band(metric, by_seed.values()) for arm, by_seed in runs.items()}
        if not all(bands.values()):
            continue
        files.append(folder / f"{metric}.svg")
        # Element names are fixed and the date is left out, so that the same numbers give the same file.
        with rc_context({"svg.hashsalt": metric}):
            _figure(metric, bands).savefig(files[-1], metadata={"Date": None})
    return files


def _band(metric: str, runs: Collection[RunMeasures]) -> dict[int, Estimate]:
    """Average a curve over runs at the steps that all runs have."""
    curves = [dict(run.curves[metric]) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: estimate([curve[step] for curve in curves]) for step in steps}


def _figure(metric: str, bands: Mapping[str, Mapping[int, Estimate]]) -> Figure:
    half = max(max(band) for band in bands.values()) / 2
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for number, (arm, band) in enumerate(bands.items()):
        _draw(whole, band, number, label=arm)
        _draw(end, {step: each for step, each in band.items() if step >= half}, number, label=arm)
    whole.set_ylabel(metric.replace("_", " "))
    end.set_title("second half of the steps", fontsize=9)
    whole.set_title("mean over seeds, band: 95 % interval", fontsize=9)
    end.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (whole, end):
        axes.set_xlabel("step")
        axes.grid(visible=True, alpha=0.25)
    return figure


def style(number: int) -> Mapping[str, Any]:
    """Return colour, dashes and marker of arm `number`, from 0; the first 49 arms have different styles."""
    seen = number // len(_COLOURS)  # arms with the same colour differ in dashes and marker
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[(number + seen) % len(_DASHES)],
        "marker": _MARKERS[(number + 2 * seen) % len(_MARKERS)],
    }


def _draw(axes: Axes, band: Mapping[int, Estimate], number: int, *, label: str) -> None:
    own = style(number)
    means = [each.mean for each in band.values()]
    axes.plot(list(band), means, **own, markersize=4, label=label)
    if not all(math.isnan(each.low) for each in band.values()):
        low, high = [each.low for each in band.values()], [each.high for each in band.values()]
        axes.fill_between(list(band), low, high, color=own["color"], alpha=0.12, linewidth=0)
