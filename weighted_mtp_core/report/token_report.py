"""What the report shows of single tokens, kept in the run folder as `report_tokens.json`."""

from __future__ import annotations

import json
from pathlib import Path

import cattrs
from attrs import frozen

from weighted_mtp_core.metrics.critic_report import ReliabilityBin
from weighted_mtp_core.storage.atomic import atomic_write

FILE = "report_tokens.json"


@frozen(kw_only=True)
class Token:
    """A token of a response.

    Attributes:
        text: What it adds to the text; empty inside a character that takes several tokens.
        weight: Mean weight of the pairs that have it as their target; None without such a pair.
        weight_K: Weight for each head if the weighting gives one per head, else empty. None where the token
            is too near the start for the head to predict it.
        loss_K: Unweighted cross-entropy of each head, in nats; None as above.
        value: The critic's value of the prefix that ends with the token; None without a critic that gives
            values.
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
    """A response and its first tokens; `more` further tokens are left out."""

    name: str
    reward: float
    tokens: tuple[Token, ...]
    more: int = 0


@frozen(kw_only=True)
class ProblemTokens:
    """A validation problem and up to two responses, a correct one first."""

    prompt: str
    solutions: tuple[Solution, ...]


@frozen(kw_only=True)
class TokenReport:
    """The contents of the file.

    Attributes:
        step: Step of stage 2 for which the weighting computed the weights.
        rows: Number of responses that were weighed as one batch.
        unweighed: Why there are no weights; empty if there are.
        problems: The problems on the page.
        reliability: Bins of the critic's values; empty without a critic that gives values.
    """

    step: int
    rows: int
    unweighed: str = ""
    problems: tuple[ProblemTokens, ...]
    reliability: tuple[ReliabilityBin, ...] = ()


def save_token_report(report: TokenReport, run: Path) -> Path:
    """Write the file into a run folder and return its path."""
    path = run / FILE
    atomic_write(path, json.dumps(cattrs.unstructure(report), ensure_ascii=False, separators=(",", ":")))
    return path


def load_token_report(run: Path) -> TokenReport | None:
    """Read the file of a run folder; None if the run ended before it was written."""
    path = run / FILE
    if not path.is_file():
        return None
    return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), TokenReport)
