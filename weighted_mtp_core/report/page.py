"""Writes the report of a run: one HTML file that is readable without a network and without colours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import is_correct
from weighted_mtp_core.recipe.train_table import SelectBy, default_selection
from weighted_mtp_core.report.charts import Chart, charts_of
from weighted_mtp_core.report.drawing import reliability_chart
from weighted_mtp_core.report.rendering import render
from weighted_mtp_core.report.shading import Shading, numbers
from weighted_mtp_core.report.token_report import load_token_report
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.run_history import RunHistory, read_history
from weighted_mtp_core.training.head_quality import selection_score
from weighted_mtp_core.training.stage_cost import cost_of

FILE = "report.html"
_STATUSES = {"FINISHED": "✓ finished", "FAILED": "✗ failed", "KILLED": "■ interrupted"}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder from the files in the folder; return the path of the report.

    Raises:
        WmtpError: The folder does not contain the journal of a run.
    """
    history, tokens = read_history(run), load_token_report(run)
    contents = _contents(history) | {
        "reliability": reliability_chart(tokens.reliability) if tokens and tokens.reliability else Markup(),
        "tokens": tokens,
        "shading": Shading.of(tokens) if tokens else None,
        "numbers": numbers,
        "is_correct": is_correct,
    }
    path = run / FILE
    atomic_write(path, render("report.html.j2", **contents))
    return path


def _contents(history: RunHistory) -> dict[str, Any]:
    """Return the variables of the template that are computed from the journal."""
    return {
        **history.run,
        "status": _status(history),
        "began": f"{datetime.fromtimestamp(history.began_ms / 1000, UTC):%d %B %Y, %H:%M} UTC",
        "lasted": _duration((history.ended_ms - history.began_ms) / 1000),
        "damaged": history.damaged,
        "figures": _figures(history),
        "facts": _facts(history),
        "params": sorted(history.params.items()),
        "tags": sorted(history.tags.items()),
        "stages": _stages(history),
        "heads": _heads(history),
        "acceptance": _acceptance(history),
        "verdicts": _verdicts(history),
        "critic": _critic(history),
    }


def _status(history: RunHistory) -> str:
    if history.status is not None:
        return _STATUSES.get(history.status, history.status.lower())
    return "✓ evaluated" if "evaluate" in history.metrics else "… not finished when this was written"


def _figures(history: RunHistory) -> list[tuple[str, str, str]]:
    """Return the most important results as (name, value, reference value or note)."""
    figures = []
    if history.tags.get(run_tags.UNINFORMATIVE_CRITIC) == "true":
        figures.append(("critic", "⚠ uninformative", "not shown to be better than a constant"))
    if history.tags.get(run_tags.ORACLE) == "true":
        figures.append(("weights", "⚠ oracle", "they use knowledge that real data do not have"))
    for name, points in history.metrics.get("evaluate", {}).items():
        if name.startswith("pass_at_"):
            figures.append((name.replace("_", " "), f"{points[-1].value:.1%}", "of problems solved"))
    figures += _validated(history)
    auc = history.last("critic", "critic_auc")
    if auc is not None:
        length = history.last("critic", "critic_length_only_auc")
        beside = "0.5 for a constant" + ("" if length is None else f", {length:.3f} for length alone")
        figures.append(("critic's AUC", f"{auc:.3f}", beside))
    speed = history.last("evaluate", "tokens_per_forward")
    if speed is not None:
        figures.append(("tokens per forward pass", f"{speed:.2f}", "1 without the extra heads"))
    return figures


def _validated(history: RunHistory) -> list[tuple[str, str, str]]:
    """Return the validation results of the kept policy; the loss of a frozen head 1 is left out."""
    validations, kept = _validations(history), _kept_step(history)
    if kept is None:
        return []
    titles: dict[SelectBy, str] = {
        "head_1": "held-out loss, head 1",
        "later_heads": "held-out loss, mean of heads 2..K",
        "acceptance": "held-out tokens per pass",
    }
    if history.params.get("model.train") == "heads":
        del titles["head_1"]
    found = []
    for each, title in titles.items():
        start, best = (abs(selection_score(validations[step], each)) for step in (min(validations), kept))
        if math.isfinite(best):
            found.append((title, f"{best:.3f}", f"{start:.3f} at the start"))
    return found


def _validations(history: RunHistory) -> dict[int, dict[str, float]]:
    """Return the results of each validation of stage 2, by step and metric."""
    found: dict[int, dict[str, float]] = {}
    for name, points in history.metrics.get("policy", {}).items():
        if name.startswith("validation_"):
            for point in points:
                found.setdefault(point.step, {})[name] = point.value
    return found


def _kept_step(history: RunHistory) -> int | None:
    """Return the step of the validation that selected the kept policy; None if no score is finite."""
    params = history.params
    default = default_selection(params.get("model.train"), params.get("loss.heads"))
    select_by = cast("SelectBy", params.get("train.select_by", default))
    scores = {step: selection_score(found, select_by) for step, found in _validations(history).items()}
    finite = [step for step in sorted(scores) if math.isfinite(scores[step])]
    return max(finite, key=scores.__getitem__, default=None)


def _facts(history: RunHistory) -> list[tuple[str, str]]:
    """Return the rows of the table `The run`, without rows whose value is empty."""
    tags, params = history.tags, history.params
    data = [tags.get(run_tags.DATA), params.get("data.name"), params.get("data.version")]
    steps = f"{params.get('train.steps', '?')} x {params.get('train.batch_size', '?')}"
    if (last := tags.get(f"{run_tags.STOPPED_EARLY_PREFIX}policy", "no")) != "no":
        steps += f", stopped early after step {last}"
    plugins = [tags[name] for name in sorted(tags) if name.startswith(run_tags.PLUGIN_PREFIX)]
    facts = [
        ("weighting", tags.get(run_tags.WEIGHTING, "")),
        ("critic", tags.get(run_tags.CRITIC, "")),
        ("data", " ".join(filter(None, data))),
        ("SHA-256 of the data", params.get("data.sha256", "")),
        ("base model", tags.get(run_tags.MODEL_VERSION, params.get("model.base", ""))),
        ("heads", params.get("model.n_future", "")),
        ("steps, batch size", steps),
        ("seed", params.get("run.seed", "")),
        ("plugins", ", ".join(filter(None, plugins))),
        *_cost(history),
    ]
    return [(name, value) for name, value in facts if value]


def _cost(history: RunHistory) -> list[tuple[str, str]]:
    """Return the cost of stage 2: its rates, as medians over the logged steps, and its peak memory."""
    cost = cost_of("policy", history.timings)
    formats = {
        "tokens_per_second": ("{:,.0f} tokens/s", 1.0),
        "flops_per_second": ("{:,.1f} GFLOP/s", 1e9),
        "matrix_rate_share": ("{:.0%} of the rate of a large matrix product", 1.0),
    }
    rates = [text.format(cost[name] / unit) for name, (text, unit) in formats.items() if name in cost]
    peaks = [
        f"{cost[name]:,.0f} MB {where}"
        for name, where in (("peak_host_memory", "of the host"), ("peak_device_memory", "of the device"))
        if name in cost
    ]
    return [("speed of stage 2", ", ".join(rates)), ("peak memory of a process", ", ".join(peaks))]


def _stages(history: RunHistory) -> list[tuple[str, Sequence[Chart], Sequence[Chart]]]:
    """Return (title, important charts, other charts) for the policy and the critic, if they have charts."""
    stages = [
        (title, *charts_of(history.metrics.get(stage, {})))
        for stage, title in (("policy", "Policy"), ("critic", "Critic"))
    ]
    return [stage for stage in stages if any(stage[1:])]


def _heads(history: RunHistory) -> list[dict[str, float | None]]:
    """Return the measures of each head; `best` is the validation loss of the policy that was kept."""
    validated, kept = history.numbered("policy", "validation_ce_head_"), _kept_step(history)
    return [
        {
            "number": number,
            "start": points[0].value,
            "best": next((point.value for point in points if point.step == kept), None),
            "test": _test(history, f"test_ce_head_{number}"),
            "accuracy": _test(history, f"test_accuracy_head_{number}"),
            "confirmed": _test(history, f"test_acceptance_head_{number}"),
        }
        for number, points in validated
    ]


def _test(history: RunHistory, metric: str) -> float | None:
    """Return a metric of stage 3, from the whole split or some of its examples; None if not measured."""
    part = re.compile(rf"{metric}(_of_\d+_examples)?")
    names = [name for name in history.metrics.get("evaluate", {}) if part.fullmatch(name)]
    return history.last("evaluate", names[-1]) if names else None


def _acceptance(history: RunHistory) -> list[tuple[str, float]]:
    """Return the share of accepted drafts of each head."""
    drafts = history.numbered("evaluate", "acceptance_position_")
    return [(f"head {number}", points[-1].value) for number, points in drafts]


def _verdicts(history: RunHistory) -> list[tuple[str, float]]:
    """Return the share of each verdict among the verdicts on the policy's responses."""
    return [
        (name.removeprefix("verdict_").replace("_", " "), points[-1].value)
        for name, points in history.metrics.get("evaluate", {}).items()
        if name.startswith("verdict_")
    ]


_MEASURES = {
    "auc": "AUC",
    "auc_half": "AUC after 50 % of the response",
    "auc_quarter": "AUC after 25 % of the response",
    "training_auc": "AUC on training responses",
    "training_auc_half": "AUC on training responses after 50 %",
    "training_auc_quarter": "AUC on training responses after 25 %",
    "pairwise_accuracy": "correct above incorrect, within a problem",
    "bce": "cross-entropy, nats",
    "brier": "Brier score",
    "ece": "calibration error, 15 bins",
    "margin": "value of correct minus value of incorrect",
    "td_spikiness": "largest TD error divided by the mean",
    "position_correlation": "rank correlation with position",
    "length_correlation": "rank correlation with length",
    "falls_at_slip": "largest fall of the value at a known mistake",
}


def _critic(history: RunHistory) -> list[dict[str, Any]]:
    """Return the last measures of the critic and its two baselines; empty if none were recorded."""
    interval = history.last("critic", "critic_auc_low"), history.last("critic", "critic_auc_high")
    rows = [
        {
            "name": title,
            "critic": history.last("critic", f"critic_{measure}"),
            "constant": history.last("critic", f"critic_constant_{measure}"),
            "length_only": history.last("critic", f"critic_length_only_{measure}"),
            "interval": interval if measure == "auc" else None,
        }
        for measure, title in _MEASURES.items()
    ]
    return [row for row in rows if row["critic"] is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
