"""The tracker of a run that is recorded in its run folder only."""

from __future__ import annotations

from weighted_mtp_core.api import Tracker


class NoopTracker(Tracker):
    """Accepts everything and keeps nothing: `enabled = false` selects it."""

    def _skip(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    start = log_metrics = log_artifact = set_tags = finish = _skip
