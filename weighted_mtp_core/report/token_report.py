"""Define the data of tokens that the report shows, and store the data in `report_tokens.json`."""

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
    """A token of a response, of a message between two turns of the assistant in a chat, or of a preview.

    Attributes:
        text: The text that the token adds; it may be empty if the token ends inside a character.
        weight: Mean weight of the token over the heads that predict it; None if no head predicts it, or if
            the weights could not be computed (`TokenReport.unweighed`).
        weight_K: Weight for each head if the weighting returns a weight per head; otherwise, and in a
            preview, empty. The weight is None for a head that does not predict the token, for example because
            the token is too near the start of its document.
        loss_K: Unweighted cross-entropy of each head, in nats; None as in `weight_K`. Empty in a preview.
        value: The critic's value of the prefix that ends with the token, at most 1; None if the token is not
            learned, or if the run has no critic that computes values.
        change: TD error r_t + V_t - V_{t-1} of the token. V_t is the value of the prefix that ends at token
            t, and r_t is 0; at the last token, V_t is 0 and r_t the reward of the response. None as in
            `value`, or if V_{t-1} is unknown.
        is_target: Whether the token is learned; False, for example, for a message between two turns of the
            assistant.
    """

    text: str
    weight: float | None
    weight_K: tuple[float | None, ...] = ()
    loss_K: tuple[float | None, ...]
    value: float | None = None
    change: float | None = None
    is_target: bool = True


@frozen(kw_only=True)
class Solution:
    """A response and its first tokens; `more` is the number of tokens that are left out."""

    name: str
    reward: float
    tokens: tuple[Token, ...]
    more: int = 0


@frozen(kw_only=True)
class ProblemTokens:
    """A validation problem with up to two responses, a correct one first; or all documents of a preview."""

    prompt: str
    solutions: tuple[Solution, ...]


@frozen(kw_only=True)
class TokenReport:
    """The contents of `report_tokens.json`.

    Attributes:
        step: Step of stage 2 for which the weighting computed the weights.
        rows: Number of responses that were weighed as one batch.
        unweighed: The reason why there are no weights; empty if there are weights.
        problems: The problems on the page.
        reliability: Bins of the critic's values; empty if the values were not measured.
    """

    step: int
    rows: int
    unweighed: str = ""
    problems: tuple[ProblemTokens, ...]
    reliability: tuple[ReliabilityBin, ...] = ()

    @property
    def has_messages(self) -> bool:
        """Whether some tokens are not targets, because they belong to messages between two turns."""
        solutions = [solution for problem in self.problems for solution in problem.solutions]
        return not all(token.is_target for solution in solutions for token in solution.tokens)


def save_token_report(report: TokenReport, run: Path) -> Path:
    """Write `report_tokens.json` into a run folder, and return the path of the file."""
    path = run / FILE
    atomic_write(path, json.dumps(cattrs.unstructure(report), ensure_ascii=False, separators=(",", ":")))
    return path


def load_token_report(run: Path) -> TokenReport | None:
    """Read `report_tokens.json` from a run folder; None if there is no such file."""
    path = run / FILE
    if not path.is_file():
        return None
    return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), TokenReport)
