"""Expand, run, collect and compare many runs."""
