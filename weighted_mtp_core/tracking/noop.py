"""A tracker that sends nothing; the run folder still contains all data of the run."""

from __future__ import annotations

from weighted_mtp_core.api import Tracker


class NoopTracker(Tracker):
    """Accepts all data and stores nothing; used for trackers with `enabled = false`."""

    def _skip(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    start = log_metrics = log_artifact = set_tags = finish = _skip
