"""Read and write what a run leaves in its folder."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
