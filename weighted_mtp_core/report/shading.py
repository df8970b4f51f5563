"""Computes how strongly each quantity shades a token in the report, and the numbers shown for a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attrs import frozen

from weighted_mtp_core.report.token_report import Token, TokenReport

_CLEAR = 0.2  # TD errors up to this share of the TD error with full shade are not marked as up or down


@frozen(kw_only=True)
class Scale:
    """A quantity that can shade tokens.

    Attributes:
        key: Name of the quantity in the HTML page.
        title: Label of the quantity on the page's switch.
        note: Explanation of the quantity.
        low: Label of the lightest shade or, if `signed`, of the deepest shade for negative values.
        high: Label of the deepest shade (if `signed`, for positive values).
        signed: Whether signs are shown: the shade then shows the absolute value, and hue and underline show
            the sign.
        read: Returns the value of the quantity for a token; None if the token has no value.
        bottom: The value (if `signed`, the absolute value) that is shown without shade.
        top: The value (if `signed`, the absolute value) that is shown with full shade.
    """

    key: str
    title: str
    note: str
    low: str
    high: str
    signed: bool = False
    read: Callable[[Token], float | None]
    bottom: float = 0.0
    top: float

    def shade(self, token: Token) -> float | None:
        """Return the shade of a token, from 0 to 1; None if the token has no value."""
        value = self.read(token)
        if value is None:
            return None
        size = abs(value) if self.signed else value
        return min(max((size - self.bottom) / (self.top - self.bottom), 0.0), 1.0)


@frozen
class Shading:
    """The scales of a report. Each scale covers all tokens on the page, so that shades can be compared."""

    scales: Sequence[Scale]

    @classmethod
    def of(cls, report: TokenReport) -> Shading:
        """Make a scale for every quantity that at least one token has."""
        solutions = [solution for problem in report.problems for solution in problem.solutions]
        return cls(tuple(_scales([token for solution in solutions for token in solution.tokens])))

    def style(self, token: Token) -> str:
        """Return the shades of a token as variables for the style sheet."""
        shades = ((scale.key, scale.shade(token)) for scale in self.scales)
        return ";".join(f"--{key}:{value:.2f}" for key, value in shades if value)

    def mark(self, token: Token) -> str:
        """Return CSS classes: `negative` for a weight below 0, `up` or `down` for a large TD error."""
        shade = next((scale.shade(token) or 0.0 for scale in self.scales if scale.key == "change"), 0.0)
        marks = ["negative"] if token.weight is not None and token.weight < 0 else []
        if token.change is not None and shade > _CLEAR:
            marks.append("up" if token.change > 0 else "down")
        return " ".join(marks)


def _scales(tokens: Sequence[Token]) -> Iterator[Scale]:
    weights = [token.weight for token in tokens if token.weight is not None]
    if weights:
        top, signed = max(map(abs, weights)) or 1.0, min(weights) < 0
        yield Scale(
            key="weight",
            title="weight",
            note="weight of the token as a target, mean over heads" + ("; dashed: below 0" if signed else ""),
            low=f"-{top:.3g}" if signed else "0",
            high=f"{top:.3g}",
            signed=signed,
            read=lambda token: token.weight,
            top=top,
        )
    values = [token.value for token in tokens if token.value is not None]
    if values:
        low, high = min(0.0, *values), max(1.0, *values)
        yield Scale(
            key="value",
            title="value",
            note="the critic's estimate for the text up to and including the token: 0 incorrect, 1 correct",
            low=f"{low:.3g}",
            high=f"{high:.3g}",
            read=lambda token: token.value,
            bottom=low,
            top=high,
        )
    moves = sorted(abs(token.change) for token in tokens if token.change is not None)
    if moves:
        # About 10 % of the tokens have full shade. Otherwise the last token of a response, where the reward
        # becomes known, would hide the other TD errors with its far larger TD error.
        top = moves[int(0.9 * (len(moves) - 1))] or moves[-1] or 1.0
        yield Scale(
            key="change",
            title="TD error",
            note="how the token changed the value; at the last token, reward minus value; underlined: up, "
            "dashed: down",
            low=f"-{top:.2g} or less",
            high=f"+{top:.2g} or more",
            signed=True,
            read=lambda token: token.change,
            top=top,
        )
    for k in range(max((len(token.loss_K) for token in tokens), default=0)):
        yield from _loss_scale(tokens, k)


def _loss_scale(tokens: Sequence[Token], k: int) -> Iterator[Scale]:
    losses = sorted(loss for token in tokens if (loss := token.loss_K[k]) is not None)
    if losses:
        top = losses[int(0.98 * (len(losses) - 1))] or 1.0  # otherwise outliers would hide other losses
        ahead = "the next token" if k == 0 else f"{k + 1} tokens ahead"
        yield Scale(
            key=f"loss{k + 1}",
            title=f"loss, head {k + 1}",
            note=f"cross-entropy in nats of the head that predicts {ahead}",
            low="0",
            high=f"{top:.3g} or more",
            read=lambda token: token.loss_K[k],
            top=top,
        )


def numbers(token: Token) -> str:
    """Return the lines of text that the page shows when the pointer is over a token."""
    lines = [repr(token.text)]
    if not token.is_target:
        return "\n".join([*lines, "not a target"])
    if token.weight is not None:
        each = f"  (heads: {_listed(token.weight_K)})" if token.weight_K else ""
        lines.append(f"weight    {token.weight:.3f}{each}")
    if token.value is not None:
        lines.append(f"value     {token.value:.3f}")
    if token.change is not None:
        lines.append(f"TD error {token.change:+.3f}")
    return "\n".join([*lines, f"loss      {_listed(token.loss_K)}"])


def _listed(values: Sequence[float | None]) -> str:
    return "  ".join("–" if value is None else f"{value:.3f}" for value in values)  # noqa: RUF001
