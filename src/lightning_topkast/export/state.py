"""The tensors of a model that are exported, by name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_topkast.errors import TopKastError

Source = nn.Module | Mapping[str, Tensor]
"""A model, or its state dict."""

_SPARSE_FROM = 0.1  # share of zeros


def tensors_of(source: Source) -> dict[str, Tensor]:
    """Return the tensors of a model or state dict by name, on CPU and contiguous; tied tensors are the same object.

    Raises:
        TopKastError: an entry is not an ordinary tensor, or its name is not a string.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    if isinstance(source, nn.Module):
        first: dict[int, str] = {}
        # packed weights are computed at each access; their parameters show which are tied
        for name, parameter in source.named_parameters(remove_duplicate=False):
            state[name] = state[first.setdefault(id(parameter), name)]
    made: dict[tuple[object, ...], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise TopKastError(f"expected a string as name of a tensor, got {name!r:.60}; rename it in the state dict")
        if not isinstance(value, Tensor):
            raise TopKastError(f"expected '{name}' to be a tensor, got {type(value).__name__}; remove it")
        if isinstance(value, DTensor) or value.is_meta or value.layout is not torch.strided:
            raise TopKastError(
                f"expected '{name}' to be an ordinary tensor of a model on one process, got a {type(value).__name__} "
                f"on {value.device} in layout {value.layout}"
            )
        where = _place(value)
        if where not in made:
            made[where] = _own(value)
        tensors[name] = made[where]
    return tensors


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of tied tensors, each with the first name of the tensor."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: original for name, original in names.items() if name != original}


def is_sparse(tensor: Tensor) -> bool:
    """Return whether this is a weight (at least two dimensions, floating point) of which at least a tenth is zero."""
    if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
        return False
    return density(tensor) <= 1 - _SPARSE_FROM


def density(tensor: Tensor) -> float:
    """Return the share of non-zero entries; 1 for an empty tensor."""
    # count_nonzero does not support 8-bit floats
    values = tensor.float() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
    return int(torch.count_nonzero(values)) / tensor.numel() if tensor.numel() else 1.0


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, including NaNs and the signs of zeros."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the tensors in bytes; tied tensors count once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())


def _place(tensor: Tensor) -> tuple[object, ...]:
    if not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # a part of a larger tensor would write all of it to a file
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
