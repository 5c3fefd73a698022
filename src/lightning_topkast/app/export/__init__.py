"""Export the weights or the network of a trained run."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
