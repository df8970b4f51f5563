"""What the page shows of single tokens, and the file `report_tokens.json` that keeps it in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import cattrs
from attrs import frozen

from weighted_mtp_core.storage.atomic import atomic_write

FILE = "report_tokens.json"


@frozen(kw_only=True)
class Token:
    """A token of a response.

    Attributes:
        text: What it adds to the text; empty within a character of several tokens.
        weight: Mean weight of the pairs that have it as their target; None if there are none.
        weight_K: Weight for each head, where the weighting tells heads apart; else empty. None where a head
            has no source for it, being too near the start.
        loss_K: Unweighted cross-entropy of each head, in nats; None as above.
        value: The critic's value of the prefix that ends with it; None without a critic that gives values.
        change: Its TD error r_t + V_t - V_{t-1}, where V after the last token is 0 and r there the reward.
    """

    text: str
    weight: float | None
    weight_K: tuple[float | None, ...] = ()
    loss_K: tuple[float | None, ...]
    value: float | None = None
    change: float | None = None


@frozen(kw_only=True)
class Solution:
    """A response with what is known of its tokens; `more` tokens at its end are left out."""

    name: str
    reward: float
    tokens: tuple[Token, ...]
    more: int = 0


@frozen(kw_only=True)
class ProblemTokens:
    """A validation problem, with a right response before a wrong one where there are both."""

    prompt: str
    solutions: tuple[Solution, ...]


@frozen(kw_only=True)
class Reliability:
    """A bin of the critic's values, see `stages.critic.ReliabilityBin`."""

    count: int
    value: float
    reward: float
    low: float
    high: float


@frozen(kw_only=True)
class TokenReport:
    """Everything in the file.

    Attributes:
        step: Of stage 2 that the weighting was told.
        rows: How many responses were weighed together.
        unweighed: Why there are no weights; empty if there are.
        problems: What is shown of them.
        reliability: The critic's bins; empty without a critic that gives values.
    """

    step: int
    rows: int
    unweighed: str = ""
    problems: tuple[ProblemTokens, ...]
    reliability: tuple[Reliability, ...] = ()


def save_token_report(look: TokenReport, run: Path) -> Path:
    """Write it into a run folder and return the file's path."""
    path = run / FILE
    atomic_write(path, json.dumps(cattrs.unstructure(look), ensure_ascii=False, separators=(",", ":")))
    return path


def load_token_report(run: Path) -> TokenReport | None:
    """Read it back; None if the run did not get that far."""
    path = run / FILE
    if not path.is_file():
        return None
    return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), TokenReport)
