"""Shows a preview as lines of text, with colours in a terminal, or as a page with the report's shading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from weighted_mtp_core.report.preview import Preview, PreviewToken
from weighted_mtp_core.report.rendering import render
from weighted_mtp_core.report.shading import Shading
from weighted_mtp_core.report.token_report import ProblemTokens, Solution, TokenReport
from weighted_mtp_core.storage.atomic import atomic_write

_SHADE, _MINUS = (11, 98, 168), (196, 98, 16)  # the colours of full shade in the report


def print_preview(preview: Preview) -> None:
    """Print the facts, then each document as text and one line per token; only a terminal gets colours."""
    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    wide = max(len(label) for label, _ in preview.facts)
    for label, text in preview.facts:
        console.print(f"{label.ljust(wide)}  {text}")
    top = max((abs(token.weight or 0.0) for each in preview.documents for token in each.tokens), default=0.0)
    for document in preview.documents:
        pairs = ", ".join(f"head {k}: {count}" for k, count in enumerate(document.pairs_K, start=1))
        console.print(f"\nexample {document.name}: {len(document.tokens)} tokens; pairs of {pairs}")
        shaded = Text.assemble(*((token.text, _style(token, top=top)) for token in document.tokens))
        for line in shaded.split("\n", allow_blank=True):
            console.print(Text.assemble("  | ", line))
        wide = max(len("weight"), *(len(weight_text(token)) for token in document.tokens))
        console.print(f"{'id':>8}  {'target':6}  {'weight':{wide}}  text")
        for token in document.tokens:
            front = f"{token.id:>8}  {'yes' if token.is_target else '-':6}  {weight_text(token):{wide}}  "
            console.print(Text.assemble(front, (repr(token.text), _style(token, top=top))))


def _style(token: PreviewToken, *, top: float) -> str:
    """Return the colours of a token; `top` is the absolute weight that has full shade."""
    weight = token.weight or 0.0
    shade = abs(weight) / top if top else 0.0
    if not token.is_target or not shade:
        return "" if token.is_target else "dim"
    red, green, blue = (round(255 + shade * (full - 255)) for full in (_SHADE if weight > 0 else _MINUS))
    return f"{'white' if shade > 0.5 and weight > 0 else 'black'} on rgb({red},{green},{blue})"


def weight_text(token: PreviewToken) -> str:
    """Return a token's weight as text: one number, or one per head if they differ.

    The text is `-` for a token that is not a target, and `?` if the weight is unknown.
    """
    if not token.is_target:
        return "-"
    if not token.weight_K:
        return "?"
    if len({weight for weight in token.weight_K if weight is not None}) == 1:
        return f"{token.weight:.4g}"
    return " ".join("-" if weight is None else f"{weight:.4g}" for weight in token.weight_K)


def write_page(preview: Preview, path: Path) -> None:
    """Write the preview as an HTML page that needs no network."""
    tokens = [[token.as_reported() for token in each.tokens] for each in preview.documents]
    report = TokenReport(
        step=0,
        rows=len(preview.documents),
        problems=(
            ProblemTokens(
                prompt="",
                solutions=tuple(
                    Solution(name=each.name, reward=1.0, tokens=tuple(shown))
                    for each, shown in zip(preview.documents, tokens, strict=True)
                ),
            ),
        ),
    )
    shading = Shading.of(report)
    page = render(
        "preview.html.j2",
        preview=preview,
        shading=shading,
        styles=[[shading.style(token) for token in shown] for shown in tokens],
        marks=[[shading.mark(token) for token in shown] for shown in tokens],
        numbers=_numbers,
    )
    atomic_write(path, page)


def _numbers(token: PreviewToken) -> str:
    """Return the lines of text that the page shows when the pointer is over a token."""
    return "\n".join(_facts(token))


def _facts(token: PreviewToken) -> Iterator[str]:
    yield repr(token.text)
    yield f"id      {token.id}"
    yield f"weight  {weight_text(token)}" if token.is_target else "not a target"
