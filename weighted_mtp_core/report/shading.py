"""How strongly each token is shaded, by each quantity, and the words that appear beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attrs import frozen

from weighted_mtp_core.report.token_report import Solution, Token, TokenReport

_CLEAR = 0.2  # of the TD error that is shaded fully: below it a token is not marked as up or down


@frozen(kw_only=True)
class Quantity:
    """Something that tokens can be shaded by.

    Attributes:
        key: Names it in the page.
        title: On the switch.
        note: What it is.
        low: What no shade means, in words.
        high: What the deepest shade means.
        signed: Whether it can be negative; tokens are then marked by an underline too.
    """

    key: str
    title: str
    note: str
    low: str
    high: str
    signed: bool = False


@frozen(kw_only=True)
class ShadedToken:
    """A token on the page: its text, its style sheet variables, its marks and its numbers."""

    text: str
    style: str
    marks: str
    numbers: str


@frozen(kw_only=True)
class ShadedSolution:
    """A response on the page."""

    name: str
    reward: float
    tokens: Sequence[ShadedToken]
    more: int


@frozen(kw_only=True)
class ShadedProblem:
    """A problem on the page."""

    prompt: str
    solutions: Sequence[ShadedSolution]


@frozen(kw_only=True)
class Shaded:
    """All that is shaded."""

    quantities: Sequence[Quantity]
    problems: Sequence[ShadedProblem]
    rows: int
    unweighed: str


@frozen(kw_only=True)
class _Scale:
    """Turns a quantity's values into shades: 0 for `bottom`, 1 for `top` and above."""

    quantity: Quantity
    read: Callable[[Token], float | None]
    bottom: float
    top: float

    def shade(self, token: Token) -> float | None:
        """Return the shade from 0 to 1, of the size alone where the quantity is signed."""
        value = self.read(token)
        if value is None:
            return None
        size = abs(value) if self.quantity.signed else value
        return min(max((size - self.bottom) / (self.top - self.bottom), 0.0), 1.0)


def shade(look: TokenReport) -> Shaded:
    """Scale every quantity over all tokens that are shown, so that shades can be compared."""
    solutions = [solution for each in look.problems for solution in each.solutions]
    scales = list(_scales([token for each in solutions for token in each.tokens]))
    return Shaded(
        quantities=[scale.quantity for scale in scales],
        problems=[
            ShadedProblem(
                prompt=each.prompt, solutions=[_solution(solution, scales) for solution in each.solutions]
            )
            for each in look.problems
        ],
        rows=look.rows,
        unweighed=look.unweighed,
    )


def _scales(tokens: Sequence[Token]) -> Iterator[_Scale]:
    """Yield the scales of what is known: one of a quantity that no token has would say nothing."""
    weights = [token.weight for token in tokens if token.weight is not None]
    if weights:
        top = max(weights) or 1.0
        yield _Scale(
            quantity=Quantity(
                key="weight",
                title="weight",
                note="what the weighting gives the token as a target, mean over heads",
                low="0",
                high=f"{top:.3g}",
            ),
            read=lambda token: token.weight,
            bottom=0.0,
            top=top,
        )
    values = [token.value for token in tokens if token.value is not None]
    if values:
        low, high = min(0.0, *values), max(1.0, *values)
        yield _Scale(
            quantity=Quantity(
                key="value",
                title="value",
                note="what the critic expects of the text up to and with the token: 0 wrong, 1 right",
                low=f"{low:.3g}",
                high=f"{high:.3g}",
            ),
            read=lambda token: token.value,
            bottom=low,
            top=high,
        )
    yield from _change_scale(tokens)
    for k in range(max((len(token.loss_K) for token in tokens), default=0)):
        yield from _loss_scale(tokens, k)


def _change_scale(tokens: Sequence[Token]) -> Iterator[_Scale]:
    """Scale by the 90 % that are smallest: at last tokens, which learn the reward, it is far larger."""
    moves = sorted(abs(token.change) for token in tokens if token.change is not None)
    if moves:
        top = moves[int(0.9 * (len(moves) - 1))] or moves[-1] or 1.0
        yield _Scale(
            quantity=Quantity(
                key="change",
                title="TD error",
                note="how the token moved the value; at the last token, reward less value",
                low=f"-{top:.2g} or less",
                high=f"+{top:.2g} or more",
                signed=True,
            ),
            read=lambda token: token.change,
            bottom=0.0,
            top=top,
        )


def _loss_scale(tokens: Sequence[Token], k: int) -> Iterator[_Scale]:
    def read(token: Token) -> float | None:
        return token.loss_K[k]

    losses = sorted(loss for loss in map(read, tokens) if loss is not None)
    if losses:
        top = losses[int(0.98 * (len(losses) - 1))] or 1.0  # a few surprises would leave all else blank
        ahead = "the next token" if k == 0 else f"{k + 1} tokens ahead"
        yield _Scale(
            quantity=Quantity(
                key=f"loss{k + 1}",
                title=f"loss, head {k + 1}",
                note=f"cross-entropy in nats of the head that guesses {ahead}",
                low="0",
                high=f"{top:.3g} or more",
            ),
            read=read,
            bottom=0.0,
            top=top,
        )


def _solution(solution: Solution, scales: Sequence[_Scale]) -> ShadedSolution:
    return ShadedSolution(
        name=solution.name,
        reward=solution.reward,
        tokens=[_token(token, scales) for token in solution.tokens],
        more=solution.more,
    )


def _token(token: Token, scales: Sequence[_Scale]) -> ShadedToken:
    shades = {scale.quantity.key: scale.shade(token) for scale in scales}
    clear = (shades.get("change") or 0.0) > _CLEAR
    up = token.change is not None and token.change > 0
    return ShadedToken(
        text=token.text,
        style=";".join(f"--{key}:{value:.2f}" for key, value in shades.items() if value),
        marks="" if not clear else "up" if up else "down",
        numbers="\n".join(_numbers(token)),
    )


def _numbers(token: Token) -> Iterator[str]:
    """Yield the lines that appear over the token."""
    yield repr(token.text)
    if token.weight is not None:
        each = f"  (heads: {_listed(token.weight_K)})" if token.weight_K else ""
        yield f"weight    {token.weight:.3f}{each}"
    if token.value is not None:
        yield f"value     {token.value:.3f}"
    if token.change is not None:
        yield f"TD error {token.change:+.3f}"
    yield f"loss      {_listed(token.loss_K)}"


def _listed(values: Sequence[float | None]) -> str:
    return "  ".join("–" if value is None else f"{value:.3f}" for value in values)  # noqa: RUF001
