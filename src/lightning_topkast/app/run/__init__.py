"""Compose, build, run and describe one training."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
