"""Expand, run, collect and compare many runs."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
