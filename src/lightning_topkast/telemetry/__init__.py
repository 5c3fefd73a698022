"""Metrics and media for loggers."""
