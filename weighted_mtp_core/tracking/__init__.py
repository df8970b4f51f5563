"""Records a run in its folder and its journal, uploads it to trackers, and shows its progress."""
