"""Writes the report of a run, one self-contained HTML page, and shows what a run trains on."""
