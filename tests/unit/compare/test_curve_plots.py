"""Curves are drawn the same each time, and each of up to 49 arms in a style of its own."""

from weighted_mtp_core.compare.measures import RunMeasures


def test_curves_are_drawn_the_same_each_time(write_run, tmp_path):
    from weighted_mtp_core.compare.plots import plot_curves

    runs = {
        arm: {s: write_run(f"{arm}{s}", (6.0, 4.0 + s, 3.0 + s / 2)) for s in (0, 1)}
        for arm in ("one", "two")
    }
    (first,) = plot_curves(runs, ["validation_ce_head_1", "no_curve"], tmp_path)
    drawn = first.read_bytes()
    (again,) = plot_curves(runs, ["validation_ce_head_1"], tmp_path)

    assert first.name == "validation_ce_head_1.svg"
    assert again.read_bytes() == drawn


def test_a_curve_without_a_step_that_all_runs_of_an_arm_have_is_not_drawn(tmp_path):
    from weighted_mtp_core.compare.plots import plot_curves

    runs = {
        step: RunMeasures(
            last={}, curves={"loss": [(step, 1.0)], "both": [(3, 1.0)]}, step_seconds=0.0, cost={}
        )
        for step in (5, 7)
    }

    files = plot_curves({"arm": runs}, ["loss", "both"], tmp_path)

    assert [file.name for file in files] == ["both.svg"]


def test_each_of_49_arms_is_drawn_in_another_style():
    from weighted_mtp_core.compare.plots import style

    assert len({str(style(number)) for number in range(49)}) == 49
