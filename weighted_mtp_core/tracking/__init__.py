"""The run folder, the durable journal, and its delivery to trackers."""
