"""Whole tensors in the place of DTensors."""

from typing import Any

from torch.distributed.tensor import DTensor


def whole(value: Any) -> Any:
    """A tensor, or all in nested dicts and lists, whole on every process; a collective."""
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    return value.full_tensor() if isinstance(value, DTensor) else value
