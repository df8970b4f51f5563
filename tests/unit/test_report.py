"""The report of a run: the contents of its journal on a self-contained page."""

import html as html_text
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.report.drawing import Series, line_chart, nice_ticks
from weighted_mtp_core.report.page import write_report
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.run_history import read_history

RUN = {"run_id": "20261123-120000-abcdef", "name": "<arm> one", "experiment": "weighted_mtp/example"}
PARAMS = {"model.n_future": "2", "data.name": "lines", "data.version": "7", "train.steps": "20"}
TAGS = {"wmtp.weighting": "example.flat", "wmtp.plugin.example": "example==1.2.3"}


@pytest.fixture
def write_journal(tmp_path):
    """Write a run folder's journal; each entry is (kind, fields)."""

    def write(*entries):
        journal = Journal(tmp_path / "metrics.jsonl")
        for second, (kind, fields) in enumerate(entries):
            journal.append(kind, fields, time_ms=1_795_442_843_000 + 1000 * second)
        journal.close()
        return tmp_path

    return write


def metrics(stage, step, **values):
    return "metrics", {"stage": stage, "step": step, "metrics": values}


WHOLE = (
    ("run", RUN),
    ("params", {"params": PARAMS}),
    ("tags", {"tags": TAGS}),
    metrics("critic", 10, critic_auc=0.81, critic_auc_low=0.7, critic_auc_high=0.9),
    metrics("critic", 10, critic_brier=0.125, critic_constant_brier=0.25, critic_length_only_brier=0.1875),
    metrics("policy", 0, validation_ce_head_1=2.5, validation_ce_head_2=3.5),
    metrics("policy", 10, train_loss=2.25, my_metric=1.0),
    metrics("policy", 10, validation_ce_head_1=1.25, validation_ce_head_2=2.125),
    metrics("policy", 20, train_loss=2.0, my_metric=2.0),
    metrics("policy", 20, validation_ce_head_1=1.5, validation_ce_head_2=2.0),
    metrics(
        "evaluate",
        20,
        test_ce_head_1=1.375,
        pass_at_1=0.625,
        acceptance_position_2=0.875,
        verdict_cpu_limit=0.25,
    ),
    ("status", {"status": "FINISHED"}),
)


def page(run):
    return write_report(run).read_text()


def text(html):
    """The text of a page, without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


def test_the_page_tells_what_the_run_was(write_journal):
    html = page(write_journal(*WHOLE))

    for word in (
        "&lt;arm&gt; one",
        "weighted_mtp/example",
        "example.flat",
        "example==1.2.3",
        "lines 7",
        "finished",
    ):
        assert word in html
    assert "<arm>" not in html


def test_the_page_needs_nothing_but_itself(write_journal):
    html = page(write_journal(*WHOLE))

    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|https?://', html) == []


def test_the_loss_that_counts_is_that_of_the_step_that_was_kept(write_journal):
    shown = text(page(write_journal(*WHOLE)))

    assert "held-out loss, head 1 1.250 2.500 at the start" in shown
    assert "held-out loss, mean of heads 2..K 2.125 3.500 at the start" in shown
    assert "1 2.500 1.250 1.375" in shown  # head 1: start, kept, test
    assert "2 3.500 2.125 –" in shown  # noqa: RUF001 - head 2: start, kept, no test


def test_the_kept_step_is_that_of_the_heads_that_are_trained(write_journal):
    params = "params", {"params": PARAMS | {"model.train": "heads"}}

    shown = text(page(write_journal(WHOLE[0], params, *WHOLE[2:])))

    assert "held-out loss, mean of heads 2..K 2.000 3.500 at the start" in shown
    assert "held-out loss, head 1" not in shown  # head 1 is frozen, so its loss is constant
    assert "1 2.500 1.500 1.375" in shown
    assert "2 3.500 2.000 –" in shown  # noqa: RUF001 - nothing was tested


def test_acceptance_can_choose_the_kept_step(write_journal):
    params = "params", {"params": PARAMS | {"train.select_by": "acceptance"}}
    lengths = [metrics("policy", step, validation_acceptance_length=1 + step / 40) for step in (0, 10, 20)]
    tested = metrics("evaluate", 20, test_acceptance_head_2=0.75)

    html = page(write_journal(WHOLE[0], params, *WHOLE[2:-1], *lengths, tested))

    assert "held-out loss, head 1 1.500 2.500 at the start" in text(html)
    assert "held-out tokens per pass 1.500 1.000 at the start" in text(html)
    assert "2 3.500 2.000 – – 75.0 %" in text(html)  # noqa: RUF001 - no loss or accuracy was tested
    assert 'aria-label="Held-out tokens per pass"' in html


def test_pass_rate_acceptance_verdicts_and_auc_are_shown(write_journal):
    shown = text(page(write_journal(*WHOLE)))

    assert "pass at 1 62.5%" in shown
    assert "head 2 87.5%" in shown
    assert "cpu limit 25.0%" in shown
    assert "0.810 [0.700, 0.900]" in shown
    assert "Brier score 0.125 0.250 0.188" in shown


def test_a_metric_that_only_a_plugin_knows_has_a_curve(write_journal):
    assert 'aria-label="my metric"' in page(write_journal(*WHOLE))


def test_the_metrics_of_plugins_come_first(write_journal):
    more = metrics(
        "policy", 10, td_error_mean=0.5, weight_mean=1.0, own_head_2=2.0, validation_accuracy_head_1=0.5
    )

    html = page(write_journal(*WHOLE[:-1], more, metrics("policy", 20, td_error_mean=0.25), WHOLE[-1]))

    titles = re.findall(r"<figure[^>]*><h3>([^<]*)</h3>", html.split(": curves</h2>")[1])
    assert titles[:5] == [
        *("own", "Mean TD error", "my metric"),
        *("Training loss", "Held-out loss of each head"),
    ]
    assert titles[-1] == "weight mean"


def figures(run):
    """The tiles of the page: (title, value, what to compare it with)."""
    tile = r'<div class="card"><div[^>]*>([^<]*)</div><div class="big">([^<]*)</div><div[^>]*>([^<]*)</div>'
    tiles = re.findall(tile, page(run))
    return [tuple(html_text.unescape(part) for part in tile) for tile in tiles]


def test_a_critic_that_is_not_better_than_a_constant_is_the_first_figure(write_journal):
    mark = ("tags", {"tags": {"wmtp.uninformative_critic": "true"}})

    assert figures(write_journal(*WHOLE[:-1], mark, WHOLE[-1]))[:2] == [
        ("critic", "⚠ uninformative", "not shown to be better than a constant"),
        ("pass at 1", "62.5%", "of problems solved"),
    ]


def test_an_informative_critic_is_not_marked(write_journal):
    assert [title for title, _, _ in figures(write_journal(*WHOLE))] == [
        *("pass at 1", "held-out loss, head 1", "held-out loss, mean of heads 2..K", "critic's AUC"),
    ]


def test_the_heads_share_a_chart(write_journal):
    html = page(write_journal(*WHOLE))
    (chart,) = re.findall(r'(?s)<svg role="img" aria-label="Held-out loss of each head".*?</svg>', html)

    labels = [each.text for each in ET.fromstring(chart).iter("text") if "label" in each.get("class")]
    assert labels == ["head 2", "head 1"]


def test_a_run_that_failed_at_once_has_a_page(write_journal):
    run = write_journal(WHOLE[0], WHOLE[1], WHOLE[2], ("status", {"status": "FAILED"}))

    assert "failed" in text(page(run))


def test_a_run_that_died_is_called_unfinished(write_journal):
    assert "not finished" in text(page(write_journal(*WHOLE[:7])))


def test_a_run_that_goes_on_after_its_end_is_not_finished(write_journal):
    run = write_journal(*WHOLE[:6], ("status", {"status": "KILLED"}), *WHOLE[6:8])

    assert read_history(run).status is None


def test_a_damaged_line_is_counted_and_left_out(write_journal):
    run = write_journal(*WHOLE)
    journal = run / "metrics.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"train_loss":2.25', b'"train_loss":9.25'))

    assert "left out: 1" in text(page(run))
    assert [point[:2] for point in read_history(run).points("policy", "train_loss")] == [(20, 2.0)]


def test_a_folder_without_a_journal_is_refused(tmp_path):
    with pytest.raises(WmtpError, match=r"has no `metrics.jsonl`"):
        write_report(tmp_path)


def test_what_is_not_finite_is_a_gap_in_its_line():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 2.0)]

    drawing = ET.fromstring(line_chart([Series(label="a", points=points)], title="t"))

    (path,) = (each.get("d") for each in drawing.iter("path"))
    assert re.sub(r"[^ML]", "", path) == "MLML"


def test_nothing_finite_is_not_drawn():
    assert line_chart([Series(label="a", points=[(0, math.nan)])], title="t") == ""


@given(st.integers(1, 2000))
def test_a_long_line_is_thinned_and_keeps_its_ends(count):
    drawing = ET.fromstring(line_chart([Series(label="a", points=[(x, x) for x in range(count)])], title="t"))

    titles = [each.text for each in drawing.iter("title")]
    assert len(titles) <= 201
    assert titles[0].endswith(" at 0")
    assert titles[-1].endswith(f" at {count - 1}")


finite = st.floats(-1e6, 1e6)


@given(finite, finite)
@example(0.0, 5e-324)
def test_ticks_hold_the_values_and_are_few(one, other):
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)

    room = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + room
    assert ticks[-1] >= high - room
    assert 2 <= len(ticks) <= 8


def test_series_differ_by_more_than_colour():
    series = [Series(label=str(k), points=[(0, k), (1, k)]) for k in range(4)]

    drawing = ET.fromstring(line_chart(series, title="t"))

    assert len({each.get("class") for each in drawing.iter("path")}) == 4
    assert {each.text for each in drawing.iter("text")} >= {"0", "1", "2", "3"}
