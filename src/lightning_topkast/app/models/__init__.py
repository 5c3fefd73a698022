"""Networks for the application's `model` group: each takes the shape of the data and returns logits."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
from lightning_topkast.app.models.image import CNN, MLP, resnet
from lightning_topkast.app.models.transformer import TransformerLM
from lightning_topkast.app.models.wide_resnet import WideResNet

__all__ = ["CNN", "MLP", "TransformerLM", "WideResNet", "resnet"]
