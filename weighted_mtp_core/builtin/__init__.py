"""Plugin `core`: the data sources and trackers that every algorithm shares."""
