"""The report of a run: one HTML file, readable without network, in light and dark, without colour vision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import frozen
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from weighted_mtp_core.report.charts import charts_of
from weighted_mtp_core.report.drawing import bar_chart
from weighted_mtp_core.report.reliability import reliability_chart
from weighted_mtp_core.report.run_history import RunHistory, read_history
from weighted_mtp_core.report.shading import shade
from weighted_mtp_core.report.token_report import TokenReport, load_token_report
from weighted_mtp_core.storage.atomic import atomic_write

FILE = "report.html"
_FATES = {"FINISHED": "✓ finished", "FAILED": "✗ failed", "KILLED": "■ interrupted"}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from what lies there; return its path.

    Raises:
        WmtpError: The folder holds no journal of a run.
    """
    story = read_history(run)
    environment = Environment(
        loader=PackageLoader("weighted_mtp_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    template = environment.get_template("report.html.j2")
    path = run / FILE
    atomic_write(path, template.render(_contents(story, load_token_report(run))))
    return path


@frozen(kw_only=True)
class _Head:
    """A row of the table of heads; None where it was not measured."""

    number: int
    start: float | None
    best: float | None
    test: float | None
    accuracy: float | None


@frozen(kw_only=True)
class _StageCharts:
    title: str
    first: Sequence[Any]
    others: Sequence[Any]


def _contents(story: RunHistory, look: TokenReport | None) -> dict[str, Any]:
    """Return what the template shows."""
    return {
        "name": story.run["name"],
        "experiment": story.run["experiment"],
        "run_id": story.run["run_id"],
        "fate": _fate(story),
        "began": f"{datetime.fromtimestamp(story.began_ms / 1000, UTC):%d %B %Y, %H:%M} UTC",
        "lasted": _duration((story.ended_ms - story.began_ms) / 1000),
        "damaged": story.damaged,
        "figures": _figures(story),
        "facts": _facts(story),
        "params": sorted(story.params.items()),
        "tags": sorted(story.tags.items()),
        "stages": _stages(story),
        "heads": _heads(story),
        "acceptance": _acceptance(story),
        "verdicts": _verdicts(story),
        "critic": _critic(story),
        "reliability": reliability_chart(look.reliability) if look and look.reliability else Markup(),
        "shaded": shade(look) if look else None,
    }


def _fate(story: RunHistory) -> str:
    if story.status is not None:
        return _FATES.get(story.status, story.status.lower())
    return "✓ evaluated" if "evaluate" in story.curves else "… not finished when this was written"


def _figures(story: RunHistory) -> list[tuple[str, str, str]]:
    """Return the figures at the top: what it is, its value, what to compare it with."""
    figures = []
    for name, points in story.curves.get("evaluate", {}).items():
        if name.startswith("pass_at_"):
            figures.append((name.replace("_", " "), f"{points[-1][1]:.1%}", "of problems solved"))
    losses = _finite(story.points("policy", "validation_ce_head_1"))
    if losses:
        best = min(losses)
        figures.append(("held-out loss, head 1", f"{best:.3f}", f"{losses[0]:.3f} at the start"))
    auc = story.last("critic", "critic_auc")
    if auc is not None:
        length = story.last("critic", "critic_length_only_auc")
        beside = "0.5 for a constant" + ("" if length is None else f", {length:.3f} for length alone")
        figures.append(("critic's AUC", f"{auc:.3f}", beside))
    speed = story.last("evaluate", "tokens_per_forward")
    if speed is not None:
        figures.append(("tokens a forward pass", f"{speed:.2f}", "1 without the extra heads"))
    return figures


def _facts(story: RunHistory) -> list[tuple[str, str]]:
    """Return the run's story in a few lines; what it does not have is left out."""
    tags, params = story.tags, story.params
    data = " ".join(
        filter(None, [tags.get("wmtp.data"), params.get("data.name"), params.get("data.version")])
    )
    plugins = [value for name, value in sorted(tags.items()) if name.startswith("wmtp.plugin.") and value]
    facts = [
        ("weighting", tags.get("wmtp.weighting", "")),
        ("critic", tags.get("wmtp.critic", "")),
        ("data", data),
        ("data's SHA-256", params.get("data.sha256", "")),
        ("base model", tags.get("model_version", params.get("model.base", ""))),
        ("heads", params.get("model.n_future", "")),
        ("steps, batch", f"{params.get('train.steps', '?')} x {params.get('train.batch_size', '?')}"),
        ("seed", params.get("run.seed", "")),
        ("plugins", ", ".join(plugins)),
    ]
    return [(name, value) for name, value in facts if value]


def _stages(story: RunHistory) -> list[_StageCharts]:
    titles = {"policy": "Policy", "critic": "Critic"}
    stages = []
    for stage, title in titles.items():
        first, others = charts_of(story.curves.get(stage, {}))
        if first or others:
            stages.append(_StageCharts(title=title, first=first, others=others))
    return stages


def _heads(story: RunHistory) -> list[_Head]:
    """Return what is known of each head; `best` is at the step that head 1 was best at, which is kept."""
    validated = story.numbered("policy", "validation_ce_head_")
    kept: int | None = None
    if validated:
        finite = [(value, step) for step, value in validated[0][1] if math.isfinite(value)]
        kept = min(finite)[1] if finite else None
    return [
        _Head(
            number=number,
            start=points[0][1],
            best=dict(points).get(kept) if kept is not None else None,
            test=story.last("evaluate", f"test_ce_head_{number}"),
            accuracy=story.last("evaluate", f"test_accuracy_head_{number}"),
        )
        for number, points in validated
    ]


def _acceptance(story: RunHistory) -> Markup:
    """Draw how often what each head drafted was kept."""
    drafts = story.numbered("evaluate", "acceptance_position_")
    bars = [(f"head {number}", points[-1][1]) for number, points in drafts]
    return bar_chart(bars, title="Drafts that were kept, by head") if bars else Markup()


def _verdicts(story: RunHistory) -> Markup:
    """Draw how judging what the policy wrote ended."""
    shares = {
        name.removeprefix("verdict_").replace("_", " "): points[-1][1]
        for name, points in story.curves.get("evaluate", {}).items()
        if name.startswith("verdict_")
    }
    return bar_chart(list(shares.items()), title="Verdicts on what the policy wrote") if shares else Markup()


_MEASURES = {
    "auc": "AUC",
    "pairwise_accuracy": "right above wrong, within a problem",
    "bce": "cross-entropy, nats",
    "brier": "Brier score",
    "ece": "calibration error, 15 bins",
    "margin": "value of right less value of wrong",
    "td_spikiness": "largest over mean TD error",
    "position_correlation": "rank correlation with position",
    "length_correlation": "rank correlation with length",
}


@frozen(kw_only=True)
class _Measure:
    """A row of the table of the critic; None where it was not measured.

    `interval` is the 95 % interval of the critic's figure, where there is one.
    """

    name: str
    critic: float | None
    constant: float | None
    length_only: float | None
    interval: tuple[float | None, float | None] | None = None


def _critic(story: RunHistory) -> list[_Measure]:
    """Return the last measures of the critic beside those of its rivals; none without a critic."""
    interval = story.last("critic", "critic_auc_low"), story.last("critic", "critic_auc_high")
    rows = [
        _Measure(
            name=title,
            critic=story.last("critic", f"critic_{measure}"),
            constant=story.last("critic", f"critic_constant_{measure}"),
            length_only=story.last("critic", f"critic_length_only_{measure}"),
            interval=interval if measure == "auc" else None,
        )
        for measure, title in _MEASURES.items()
    ]
    return [row for row in rows if row.critic is not None]


def _finite(points: Sequence[tuple[int, float]]) -> list[float]:
    return [value for _, value in points if math.isfinite(value)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001
