"""Groups the metrics of a run into charts with titles, and chooses the charts that the report shows first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from weighted_mtp_core.metrics.slips import PLACES
from weighted_mtp_core.report.drawing import Series, line_chart
from weighted_mtp_core.tracking.run_history import Point
from weighted_mtp_core.training.plugin_metrics import is_core_metric


class Chart(NamedTuple):
    """A chart on the page: its title, a note on how to read it (may be empty), and the drawing."""

    title: str
    note: str
    svg: Markup


class _Group(NamedTuple):
    title: str
    note: str
    members: Mapping[str, str]  # metric -> label of its line


def _baselines(measure: str, title: str, note: str) -> _Group:
    """Group a measure of the critic with the same measure of the two baselines that the critic must beat."""
    members = {"critic": "critic", "critic_constant": "constant", "critic_length_only": "length"}
    return _Group(
        title=title, note=note, members={f"{who}_{measure}": label for who, label in members.items()}
    )


_GROUPS = (
    _Group(title="Training loss", note="weighted, in nats", members={"train_loss": "loss"}),
    _Group(title="Critic's loss", note="on training batches", members={"value_loss": "loss"}),
    _Group(
        title="Critic's AUC on held-out responses",
        note="with the 95 % interval; a constant has 0.5",
        members={
            "critic_auc_high": "high",
            "critic_auc": "AUC",
            "critic_auc_low": "low",
            "critic_length_only_auc": "length",
            "critic_constant_auc": "constant",
        },
    ),
    _baselines("bce", "Critic's cross-entropy on held-out responses", "it should stay below both baselines"),
    _baselines("pairwise_accuracy", "Correct above incorrect, within a problem", "share of held-out pairs"),
    _baselines("brier", "Critic's Brier score", "mean squared difference between value and reward"),
    _baselines("ece", "Critic's calibration error", "mean distance between value and reward, 15 bins"),
    _baselines("margin", "Critic's margin", "mean value of correct minus incorrect responses"),
    _baselines("td_spikiness", "Spikiness of TD errors", "largest / mean absolute value in a response"),
    _baselines("position_correlation", "Value and position", "rank correlation within a response"),
    _Group(
        title="Critic's AUC before the end of a response",
        note="on held-out responses, with the values after a share of the tokens",
        members={"critic_auc": "100 %", "critic_auc_half": "50 %", "critic_auc_quarter": "25 %"},
    ),
    _baselines(
        "falls_at_slip", "Largest fall of the value at a known mistake", "a constant is at chance level"
    ),
    _baselines("length_correlation", "Value and length", "rank correlation over responses"),
    _Group(
        title="How even the weights are",
        note="entropy and effective share of the pairs: 1 means equal weights",
        members={"weight_entropy": "entropy", "effective_sample_share": "eff. share"},
    ),
    _Group(
        title="Quantiles of the weights",
        note="of counted pairs",
        members={"weight_p95": "95 %", "weight_p50": "50 %", "weight_p05": "5 %"},
    ),
    _Group(
        title="Held-out tokens per pass",
        note="expected in greedy self-speculative decoding; 1 without accepted drafts",
        members={"validation_acceptance_length": "tokens"},
    ),
    _Group(
        title="Variance of the weights between responses",
        note="share of the variance; 1: all tokens of a response weigh the same",
        members={"weight_between_responses": "share"},
    ),
    _Group(
        title="Weights around known mistakes",
        note="mean weight in incorrect responses: before the first mistake, at mistakes, elsewhere",
        members={f"weight_{name}": name.removesuffix("_slip") for name in PLACES},
    ),
    _Group(title="Mean TD error", note="0: outcomes are as expected", members={"td_error_mean": "TD error"}),
)
_HEADS = {
    "validation_ce": ("Held-out loss of each head", "unweighted cross-entropy, nats per target"),
    "train_ce": ("Training loss of each head", "unweighted cross-entropy, nats per target"),
    "validation_accuracy": (
        "Held-out accuracy of each head",
        "share of targets that are the most likely token",
    ),
    "validation_acceptance": (
        "Held-out drafts that head 1 confirms",
        "share of most likely tokens that head 1 confirms",
    ),
}
_FIRST = (
    "Training loss",
    "Held-out loss of each head",
    "Held-out drafts that head 1 confirms",
    "Held-out tokens per pass",
    "Mean TD error",
    "How even the weights are",
    "Quantiles of the weights",
    "Variance of the weights between responses",
    "Weights around known mistakes",
    "Held-out accuracy of each head",
    "Critic's loss",
    "Critic's AUC on held-out responses",
    "Critic's cross-entropy on held-out responses",
)


def charts_of(metrics: Mapping[str, Sequence[Point]]) -> tuple[list[Chart], list[Chart]]:
    """Draw charts of all metrics of a stage, and return (first charts, other charts).

    The first charts show the metrics of plugins and the most important metrics of core. A chart without a
    finite value is left out.
    """
    groups = [*_head_groups(metrics), *_GROUPS]
    known = {name for group in groups for name in group.members}
    groups += [
        _Group(title=name.replace("_", " "), note="", members={name: name})
        for name in sorted(set(metrics) - known)
    ]
    charts: dict[str, Chart] = {}
    for group in groups:
        _add(charts, group, metrics)
    own = [group.title for group in groups if not all(map(is_core_metric, group.members))]
    first = [charts.pop(title) for title in [*own, *_FIRST] if title in charts]
    return first, list(charts.values())


def _head_groups(metrics: Mapping[str, Sequence[Point]]) -> list[_Group]:
    """Return a group for each metric that is computed per head; the group has a line for each head."""
    heads: dict[str, dict[str, str]] = {}
    for name in metrics:
        if match := re.fullmatch(r"(.+)_head_(\d+)", name):
            heads.setdefault(match[1], {})[name] = f"head {match[2]}"
    return [
        _Group(title=title, note=note, members=members)
        for base, members in heads.items()
        for title, note in [_HEADS.get(base, (base.replace("_", " "), "of each head"))]
    ]


def _add(charts: dict[str, Chart], group: _Group, metrics: Mapping[str, Sequence[Point]]) -> None:
    series = [
        Series(label=label, points=[(point.step, point.value) for point in metrics[name]])
        for name, label in group.members.items()
        if name in metrics
    ]
    svg = line_chart(series, title=group.title)
    if svg:
        charts[group.title] = Chart(title=group.title, note=group.note, svg=svg)
