"""Handles the device, the processes, OS signals and environment variables of a run."""
