"""The application around the callback: models, data, training, sweeps, reports and the console scripts.

Rooms that need PyTorch import `vision` before Lightning. What answers `--help` and typing errors needs neither.
"""

from lightning_topkast.app.resolvers import register_resolvers

register_resolvers()
