"""Record a run in its run folder and its journal, send the run to trackers, and show its progress."""
