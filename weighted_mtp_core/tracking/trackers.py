"""Build the trackers of a plan."""

from __future__ import annotations

from pathlib import Path

from weighted_mtp_core.api import BuildContext, Tracker
from weighted_mtp_core.plan import Plan


def build_trackers(plan: Plan) -> dict[str, Tracker]:
    """Build the trackers of a plan, keyed by the names of their delivery files, `<number>-<address>`.

    Raises:
        WmtpError: A tracker cannot be built, for example because its address is not valid.
    """
    recipe = plan.recipe
    context = BuildContext(seed=recipe.run.seed, storage=Path(recipe.run.storage))
    return {f"{i}-{chosen.address}": chosen.build(context) for i, chosen in enumerate(plan.trackers)}
