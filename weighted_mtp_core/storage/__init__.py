"""Versioned, checksummed files under `storage/`."""
