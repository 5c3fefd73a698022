"""The dtypes in which products are computed."""

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError


def is_autocast(device: str) -> bool:
    """Return whether autocast is on for this type of device; the meta device has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which PyTorch's own products compute with `input`: its own, or that of autocast."""
    device = input.device.type
    if not is_autocast(device) or input.dtype == torch.float64:
        return input.dtype
    return torch.get_autocast_dtype(device)


def to_autocast(input: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return all in the dtype of autocast if it is on for their device."""
    if not is_autocast(input.device.type) or input.dtype == torch.float64:
        return input, values, bias
    dtype = product_dtype(input)
    return input.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


def dtypes_of(input: Tensor, values: Tensor, bias: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype to compute in, float32 or float64, and that of the result, which may be autocast's.

    Raises:
        TopKastError: the tensors' dtypes differ without autocast.
    """
    computed = torch.float64 if values.dtype == torch.float64 else torch.float32
    device = input.device.type
    if is_autocast(device) and computed != torch.float64:
        return computed, torch.get_autocast_dtype(device)
    if not (values.dtype == input.dtype and (bias is None or bias.dtype == input.dtype)):
        raise TopKastError(
            f"input ({input.dtype}), values ({values.dtype}) and bias must have the same dtype; convert the input, "
            "or run under torch.autocast"
        )
    return computed, input.dtype
