"""Learning rates by step against closed forms, which are written here in another way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.recipe.structure import structure
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.schedules import learning_rate

RATE = 3e-3


def tables(schedule, **options):
    """Tables of a schedule with any length, warm-up and final share."""
    return st.builds(
        lambda steps, warmup_steps, final: TrainTable(
            steps=steps,
            warmup_steps=warmup_steps,
            learning_rate=RATE,
            final_learning_rate=final,
            schedule=schedule,
            **options,
        ),
        st.integers(1, 400),
        st.integers(0, 450),
        st.floats(0, 1),
    )


def rates(table):
    """Return the rates of all steps as shares of the highest rate."""
    return [learning_rate(table, step) / RATE for step in range(table.steps)]


SCHEDULES = ("cosine", "linear", "constant", "wsd")
ANY = st.sampled_from(SCHEDULES).flatmap(
    lambda name: st.just(name).flatmap(tables) if name != "constant" else CONSTANT
)
CONSTANT = st.builds(
    lambda steps, warmup: TrainTable(
        steps=steps, warmup_steps=warmup, learning_rate=RATE, schedule="constant"
    ),
    st.integers(1, 400),
    st.integers(0, 450),
)


@given(ANY)
def test_every_schedule_begins_with_the_same_linear_warm_up(table):
    warm = [(step + 1) / table.warmup_steps for step in range(min(table.warmup_steps, table.steps))]

    assert rates(table)[: table.warmup_steps] == pytest.approx(warm)


@given(tables("cosine"))
def test_cosine_is_half_a_period_between_the_highest_rate_and_the_final_share(table):
    final, span = table.final_learning_rate, table.steps - table.warmup_steps
    middle, half = (1 + final) / 2, (1 - final) / 2

    expected = [middle + half * math.cos(math.pi * step / span) for step in range(span)]

    assert rates(table)[table.warmup_steps :] == pytest.approx(expected)


@given(tables("linear"))
def test_linear_falls_by_the_same_amount_at_each_step(table):
    span = table.steps - table.warmup_steps

    expected = [1 - (1 - table.final_learning_rate) / span * step for step in range(span)]

    assert rates(table)[table.warmup_steps :] == pytest.approx(expected)


@given(CONSTANT)
def test_constant_stays_at_the_highest_rate(table):
    span = max(0, table.steps - table.warmup_steps)

    assert rates(table)[table.warmup_steps :] == pytest.approx([1.0] * span)


@given(tables("wsd"), st.integers(1, 100))
def test_wsd_is_constant_and_then_falls_with_the_root_of_the_time_since_the_decay_began(table, percent):
    table = TrainTable(
        steps=table.steps,
        warmup_steps=table.warmup_steps,
        learning_rate=RATE,
        final_learning_rate=table.final_learning_rate,
        schedule="wsd",
        decay_share=percent / 100,
    )
    steps, warmup, final = table.steps, table.warmup_steps, table.final_learning_rate
    decay = min(steps * percent / 100, max(0, steps - warmup))  # duration of the decay in steps

    def expected(step):
        left = steps - step
        return 1.0 if left >= decay else final + (1 - final) * (1 - ((decay - left) / max(1, decay)) ** 0.5)

    assert rates(table)[warmup:] == pytest.approx([expected(step) for step in range(warmup, steps)])


def test_wsd_by_hand():
    table = TrainTable(
        steps=100,
        warmup_steps=10,
        learning_rate=1.0,
        final_learning_rate=0.0,
        schedule="wsd",
        decay_share=0.25,
    )

    found = {step: learning_rate(table, step) for step in (4, 10, 75, 76, 79, 84, 91, 100)}

    # sqrt of 1/25, 4/25, 9/25, 16/25
    assert found == pytest.approx({4: 0.5, 10: 1.0, 75: 1.0, 76: 0.8, 79: 0.6, 84: 0.4, 91: 0.2, 100: 0.0})


@given(ANY)
def test_no_schedule_leaves_the_range_from_the_final_share_to_the_highest_rate(table):
    low = min(table.final_learning_rate, 1 / max(1, table.warmup_steps))

    assert all(low - 1e-9 <= rate <= 1 + 1e-9 for rate in rates(table))


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (
            {"decay_share": 0.5},
            'has no effect with `schedule = "cosine"`; leave it out: 0.5',
        ),
        (
            {"schedule": "constant", "final_learning_rate": 0.5},
            'has no effect with `schedule = "constant"`; leave it out: 0.5',
        ),
        (
            {"schedule": "wds"},
            "expected one of `cosine`, `linear`, `constant`, `wsd`, got str 'wds'; did you mean `wsd`?",
        ),
    ],
)
def test_a_key_that_the_schedule_does_not_use_is_refused(table, text):
    _, faults = structure(TrainTable, table)

    assert [fault.text for fault in faults] == [text]
