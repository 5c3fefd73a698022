"""Compose, build, run and describe one training."""
