"""The display: a block that is redrawn on a terminal, lines of text for any other output."""

import io
import os

import pytest
from rich.console import Console
from weighted_mtp_core.tracking import display as module
from weighted_mtp_core.tracking.display import Display, duration, show, sparkline


@pytest.fixture
def plain():
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), width=80, force_terminal=True)


def text(console):
    return console.file.getvalue()


def test_without_a_terminal_there_are_plain_lines(plain):
    with Display(plain) as display:
        display.stage("policy", 30)
        display.update(30, {"policy_loss": 0.512345, "tokens/s": 12345.6})

    assert "\x1b" not in text(plain)
    assert "\r" not in text(plain)
    assert text(plain).splitlines() == [
        "policy: 30 steps",
        "policy done: 30 steps in 0 s  policy_loss 0.5123  tokens/s 12,346",
    ]


def test_a_long_stage_speaks_now_and_then(plain, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    with Display(plain) as display:
        display.stage("policy", 4)
        display.update(2, {"policy_loss": 0.5})

    assert "policy 2/4  policy_loss 0.5  0 s left" in text(plain)


def test_a_terminal_shows_a_bar_with_the_newest_values(terminal):
    with Display(terminal) as display:
        display.stage("critic", 10)
        display.update(5, {"value_loss": 0.25})
        display.note("a note")

    assert "5/10" in text(terminal)
    assert "value_loss" in text(terminal)
    assert "a note" in text(terminal)


def test_a_stage_that_an_exception_ends_is_not_called_done(plain):
    def fail():
        with Display(plain) as display:
            display.stage("policy", 10)
            display.update(3, {})
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()

    assert "policy stopped: 3 steps" in text(plain)
    assert "done" not in text(plain)


def test_notes_are_shown_as_they_are(plain):
    with Display(plain) as display:
        display.note("[red] `x[0]` " + "long " * 40)

    assert text(plain) == "[red] `x[0]` " + "long " * 40 + "\n"


def test_without_a_terminal_the_summary_is_lines_that_can_be_copied(plain):
    with Display(plain) as display:
        display.summary([("pass@1", "0.62"), ("run", "/" + "x" * 200)])

    assert text(plain).splitlines() == ["pass@1  0.62", "run     /" + "x" * 200]


def test_on_a_terminal_the_summary_is_a_panel(terminal):
    with Display(terminal) as display:
        display.summary([("pass@1", "0.62"), ("run", "/tmp/run")])

    assert "summary" in text(terminal)
    assert "/tmp/run" in text(terminal)


def test_a_row_that_does_not_fit_the_terminal_is_not_cut_to_pieces(terminal):
    with Display(terminal) as display:
        display.summary([("pass@1", "0.62"), ("run", "/" + "x" * 200)])

    assert "run     /" + "x" * 200 in text(terminal)


def test_only_the_first_of_several_processes_shows_anything(plain, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Display(plain) as display:
        display.stage("policy", 3)
        display.note("hello")

    assert text(plain) == ""


def test_values_outside_a_stage_are_not_shown(plain):
    with Display(plain) as display:
        display.update(1, {"x": 1.0})

    assert text(plain) == ""


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▄"), ([0.0, 1.0], "▁█"), ([3.0, 2.0, float("nan"), 1.0], "█▅▁")],
)
def test_a_curve_spans_from_the_least_to_the_greatest(values, bars):
    assert sparkline(values) == bars


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "0 s"), (59, "59 s"), (185, "3:05"), (3723, "1:02:03")])
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.000312, "0.000312"), (1.23456, "1.235"), (98765.4, "98,765"), ("fast", "fast")]
)
def test_numbers_read_well(value, words):
    assert show(value) == words


def test_a_run_goes_on_when_nobody_reads_what_it_shows():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        display = Display(type(Display().console)(file=file, width=200))

        display.note("nobody reads this")
        display.note("nor this")

        assert display.console.quiet
