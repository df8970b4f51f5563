"""Evaluates policies in stage 3, reopens finished runs, and stores sampled texts as data sets."""
