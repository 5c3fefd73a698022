"""Tensors on a device that a captured graph reads: what takes their place goes into the same memory."""

import torch
from torch import Tensor


def stays(device: torch.device) -> bool:
    """Return whether tensors on a device should keep their memory, since a graph may hold its address."""
    return device.type != "cpu"


def renewed(before: Tensor, after: Tensor) -> Tensor:
    """Return `after`, in the memory of `before` if that fits and should stay."""
    alike = (before.device, before.dtype, before.shape) == (after.device, after.dtype, after.shape)
    return before.copy_(after) if alike and stays(after.device) else after
