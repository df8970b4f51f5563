"""The data source `core.jsonl`, which reads a user's own examples: rows with a prompt and a response."""

from __future__ import annotations

from weighted_mtp_core.api import SPLITS, BuildContext, DataSource, JsonlOptions, JsonlSource, WmtpError


def build_jsonl(options: JsonlOptions, context: BuildContext) -> DataSource:
    """Build the data source `core.jsonl`, which reads and checks every row of its files.

    Raises:
        WmtpError: The options contradict each other, or a file cannot be read or has invalid rows (see
            `JsonlSource`); or a row has `tests`, which this data source would ignore.
    """
    source = JsonlSource(options, context)
    for split in SPLITS:
        for row in source.rows(split):
            if row.tests:
                raise WmtpError(
                    f"problem `{row.problem_id}` has `tests`, but this data source runs no programs",
                    hint=_hint(),
                )
    return source


def _hint() -> str:
    from weighted_mtp_core.messages import quoted
    from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
    from weighted_mtp_core.plugins.selection import same_name

    others = [each for each in same_name(PluginRegistry(), Kind.DATA, "jsonl") if each != "core.jsonl"]
    judging = f"{quoted(others)} reads the same rows" if others else "use a plugin that judges such rows"
    return f"{judging}; or remove `tests` from the rows"
