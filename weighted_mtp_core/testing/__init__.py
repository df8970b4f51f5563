"""Conformance suites that a plugin's own tests subclass."""
