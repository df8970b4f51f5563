"""Device, processes, OS signals and environment variables of a run."""
