"""Data modules for the application's `data` group."""

import lightning_topkast.app.vision  # noqa: F401  before Lightning
from lightning_topkast.app.data.digits import Digits
from lightning_topkast.app.data.fashion_mnist import FashionMNIST
from lightning_topkast.app.data.sotu import Sotu
from lightning_topkast.app.data.text import Text
from lightning_topkast.app.data.torchvision_data import CIFAR10, ImageNet
from lightning_topkast.app.data.wikitext import WikiText

__all__ = ["CIFAR10", "Digits", "FashionMNIST", "ImageNet", "Sotu", "Text", "WikiText"]
