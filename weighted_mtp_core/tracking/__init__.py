"""Record a run: its folder, the journal in it, the uploads to trackers, and what a person sees."""
