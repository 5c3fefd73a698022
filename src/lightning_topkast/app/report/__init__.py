"""Reports of a run or a sweep, as one HTML page that needs no network, and as PNG files."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
