"""The application around the callback: models, data, training, sweeps, reports and the console scripts."""

from lightning_topkast.app.run.resolvers import register_resolvers
from lightning_topkast.app.vision import make_torchvision_importable

# Before any module imports Lightning, whose dependency torchmetrics imports torchvision.
make_torchvision_importable()
register_resolvers()
