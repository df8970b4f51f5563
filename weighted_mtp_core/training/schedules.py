"""Learning rates by step: a linear warm-up, then one of four schedules.

Letters: s step (0-based), w number of warm-up steps, n number of all steps, f final share of the learning
rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from weighted_mtp_core.recipe.train_table import Schedule, TrainTable


def learning_rate(table: TrainTable, step: int) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then the schedule of the table.

    After the warm-up, the learning rate is `learning_rate * (f + (1 - f) * share)`. With the progress
    p = (s - w) / (n - w), which rises from 0 towards 1, the schedules define `share` as follows:

    - `cosine`: `share` = (1 + cos(pi p)) / 2, SGDR with one period (Loshchilov and Hutter 2017, eq. 5);
    - `linear`: `share` = 1 - p;
    - `constant`: `share` = 1;
    - `wsd`, warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4): `share` is 1 until the last
      `decay_share` of the n steps, then 1 - sqrt(q), where q rises from 0 towards 1 during these last steps
      (Haegele et al. 2024, eq. 2). If the warm-up ends later than the decay would begin, the decay begins at
      the end of the warm-up.
    """
    if step < table.warmup_steps:
        return table.learning_rate * (step + 1) / table.warmup_steps
    share = _SHARES[table.schedule](table, step)
    return table.learning_rate * (table.final_learning_rate + (1 - table.final_learning_rate) * share)


def _progress(table: TrainTable, step: int, *, first: float) -> float:
    """Return the progress of a step between step `first` (0) and the end of training (1)."""
    return max(0.0, step - first) / max(1, table.steps - first)


def _cosine(table: TrainTable, step: int) -> float:
    span = max(1, table.steps - table.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - table.warmup_steps) / span))


def _linear(table: TrainTable, step: int) -> float:
    return 1 - _progress(table, step, first=table.warmup_steps)


def _wsd(table: TrainTable, step: int) -> float:
    first = max(table.warmup_steps, table.steps * (1 - table.decay_share))
    return 1 - math.sqrt(_progress(table, step, first=first))


_SHARES: Mapping[Schedule, Callable[[TrainTable, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": lambda _, __: 1.0,
    "wsd": _wsd,
}
