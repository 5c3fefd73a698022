"""The Hydra application `topkast-train`: models, data and the training script around the callback."""

from lightning_topkast.app.resolvers import register_resolvers
from lightning_topkast.app.vision import make_torchvision_importable

# Before any module of the application imports Lightning: torchmetrics, which it builds on, imports torchvision.
make_torchvision_importable()
register_resolvers()
