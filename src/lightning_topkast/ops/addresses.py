"""Tensors on a device that a captured graph reads: what takes their place goes into the same memory."""

from collections.abc import Iterable

import torch
from torch import Tensor


def stays(device: torch.device) -> bool:
    """Return whether tensors on a device should keep their memory, since a graph may hold its address."""
    return device.type != "cpu"


def overwrite(before: Iterable[Tensor], after: Iterable[Tensor]) -> bool:
    """Copy tensors over others, if all of these fit and should stay; return whether it was done."""
    pairs = list(zip(before, after, strict=True))
    if not all(
        stays(new.device) and (old.device, old.dtype, old.shape) == (new.device, new.dtype, new.shape)
        for old, new in pairs
    ):
        return False
    for old, new in pairs:
        old.copy_(new)
    return True
