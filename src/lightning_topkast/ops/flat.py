"""Finding, moving and masking the flat entries of a weight, with the fastest method on each device."""

import numpy as np
import torch
from torch import Tensor

# an integer type for every size of a floating-point entry
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def flat(tensor: Tensor) -> Tensor:
    """Return the entries in memory order, as a 1-D view; `view(-1)` does not support channels-last weights."""
    return tensor.as_strided((tensor.numel(),), (1,))


def mask_outside_(tensor: Tensor, members: Tensor) -> None:
    """Zero `tensor` where `members` (int8) is 0, and keep it where all bits are 1."""
    tensor.view(_BITS[tensor.element_size()]).bitwise_and_(members)


def count_outside(tensor: Tensor, members: Tensor) -> Tensor:
    """Count the entries of `tensor` that are not zero where `members` (int8) is 0; a scalar tensor."""
    outside = torch.bitwise_and(tensor.view(_BITS[tensor.element_size()]), ~members)
    return torch.count_nonzero(outside.view(tensor.dtype))


def has_bits(tensor: Tensor, places: np.ndarray) -> bool:
    """Return whether any bit is set in the entries of a CPU tensor at these places in memory order."""
    # NumPy takes a tenth of PyTorch's time for so few entries
    return bool(flat(tensor).view(_BITS[tensor.element_size()]).numpy()[places].any())


def copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on CPU, so that a saved state does not change when training continues."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def indices(members: Tensor) -> Tensor:
    """Return the indices at which a 1-D bool tensor is true; on CPU with NumPy, which is five times as fast."""
    if members.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(members.numpy()))
    return torch.nonzero(members).flatten()


def where(entries: Tensor, members: Tensor) -> Tensor:
    """Return the 1-D `entries` where `members` (bool) is true; on CPU with NumPy, which is five times as fast."""
    if members.device.type == "cpu":
        return torch.from_numpy(np.compress(members.numpy(), entries.numpy()))
    return entries[members]


def merged(some: Tensor, others: Tensor) -> Tensor:
    """Return the sorted union of two sorted, disjoint index tensors on CPU, in one pass over both."""
    return torch.from_numpy(np.sort(torch.cat([some, others]).numpy(), kind="stable"))
