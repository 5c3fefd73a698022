"""The handwritten digits of scikit-learn: 1,797 images of 8×8 pixels, without a download."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_topkast.app.data.base import ArrayData, ArrayDataset, shuffled, split_sizes


class Digits(ArrayData):
    """`sklearn.datasets.load_digits`, split at random into training, validation and test images.

    Args:
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        split: Fractions or counts of the training, validation and test images.
        split_seed: Seed of the split, the same in all runs so that their metrics compare.
        num_classes: 10; models refer to it.
        input_shape: [1, 8, 8]; models refer to it.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        split: Sequence[float] = (0.7, 0.1, 0.2),
        split_seed: int = 0,
        num_classes: int = 10,
        input_shape: Sequence[int] = (1, 8, 8),
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.split = split
        self.split_seed = split_seed
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)

    def load(self) -> None:
        """Scale the 17 grey levels to [0, 1] and split."""
        from sklearn.datasets import load_digits  # slow to import

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        order = shuffled(len(labels), self.split_seed)
        parts = order.split([*(sizes := split_sizes(len(labels), self.split, "images")), len(labels) - sum(sizes)])
        self.train_set, self.val_set, self.test_set = (
            ArrayDataset(images[part], labels[part], mean=0.305, std=0.376) for part in parts[:3]
        )
