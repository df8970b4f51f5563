"""Evaluates policies in stage 3, and reopens finished runs."""
