"""What a split of a data set is like: how much, how long, how often right, how difficult."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from weighted_mtp_core.api import Example
from weighted_mtp_core.data.pairs import DIFFICULTIES, difficulty_bin


def statistics_of(examples: Iterable[Example]) -> dict[str, Any]:
    """Count labelled responses.

    Returns:
        `problems` and `responses`; if there are any, `reward_rate`, the spread of lengths in characters, and
        `difficulty`: problems by their share of right responses.
    """
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    prompts: dict[str, int] = {}
    lengths: list[int] = []
    for example in examples:
        rewards[example.problem_id].append(example.reward)
        prompts[example.problem_id] = len(example.prompt)
        lengths.append(len(example.response))
    counts = {"problems": len(rewards), "responses": len(lengths)}
    if not lengths:
        return counts
    bins = Counter(difficulty_bin(statistics.fmean(row)) for row in rewards.values())
    return counts | {
        "reward_rate": statistics.fmean(reward for row in rewards.values() for reward in row),
        "prompt_characters": _spread(list(prompts.values())),
        "response_characters": _spread(lengths),
        "difficulty": {name: bins[number] for number, name in enumerate(DIFFICULTIES)},
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {
        "least": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[round(0.95 * (len(ordered) - 1))],
        "most": ordered[-1],
    }
