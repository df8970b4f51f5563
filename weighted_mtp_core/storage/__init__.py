"""Stores versions of files under `storage/`, with checksums."""
