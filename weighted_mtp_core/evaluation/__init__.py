"""Evaluates policies in stage 3, reopens finished runs, and samples data sets from policies."""
