"""Checks of a sparse weight's saved state, which is the same for every storage."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.distributed import Sharding
from lightning_topkast.method.selection import ACTIVE

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem_with(
    state: Any,
    parameter: Tensor,
    active_count: int,
    updated_count: int,
    sharding: Sharding,
    sizes_change: bool = False,
) -> str | None:
    """Return what is wrong with a weight's saved state, or None.

    If one process finds a problem, all processes that hold a part of the weight return one.

    Args:
        state: the saved state; tensors in the weight's shape, whole or DTensors.
        parameter: this process' part of the weight that holds the saved α.
        active_count: |A|.
        updated_count: |B| while exploring.
        sharding: of the weight; counts are summed over all parts.
        sizes_change: whether the sets may have other sizes than these.
    """
    problem = _misfit(state, active_count, updated_count, sharding.shape)
    elsewhere = sharding.sum(torch.tensor(int(problem is not None), device=parameter.device))
    if problem is not None or int(elsewhere):
        return problem or "another process found a problem in its part"
    return _damage(state, parameter, None if sizes_change else (active_count, updated_count), sharding)


def _misfit(state: Any, active_count: int, updated_count: int, shape: torch.Size) -> str | None:
    """Return what is wrong with types, shapes and counts, or None."""
    kinds = {"tiers": Tensor, "latent": Tensor, "never_active": Tensor, "first_reservoir": int, "promoted": int,
             "active_count": int, "updated_count": int, "strength": float, "storage": str}  # fmt: skip
    if not isinstance(state, dict):
        return f"expected a dict, got {type(state).__name__}"
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            return f"expected '{key}' to be of type {kind.__name__}, got {type(state.get(key)).__name__}"
    for key, dtypes in {"tiers": (torch.uint8,), "never_active": (torch.bool,), "latent": _FLOATING}.items():
        tensor = state[key]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            return f"expected '{key}' to be {dtypes[0]} {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
        if not holds_values(tensor):
            return f"expected '{key}' to be a dense tensor with values, got one on {tensor.device} in {tensor.layout}"
    if (state["active_count"], state["updated_count"]) != (active_count, updated_count):
        return (
            f"expected |A| = {active_count} and |B| = {updated_count}, got {state['active_count']} and "
            f"{state['updated_count']}; resume with the sparsities and distribution it had"
        )
    if not (math.isfinite(state["strength"]) and state["strength"] >= 0):
        return f"expected 'strength' to be finite and at least 0, got {state['strength']}; the file is damaged"
    for key in ("first_reservoir", "promoted"):
        if not 0 <= state[key] <= shape.numel():
            return f"expected '{key}' to be from 0 to {shape.numel()}, got {state[key]}; the file is damaged"
    storage = state["storage"]
    if storage not in ("masked", "packed", "compact"):
        return f"expected storage to be masked, packed or compact, got {storage!r:.60}; the file is damaged"
    return None


def _damage(
    state: Mapping[str, Any], parameter: Tensor, sizes: tuple[int, int] | None, sharding: Sharding
) -> str | None:
    """Return what is wrong with the values, and with the sizes of the sets unless those vary, or None."""
    tiers, latent = (sharding.to_local(state[key].detach()).cpu() for key in ("tiers", "latent"))
    is_active, alpha = tiers == ACTIVE, parameter.detach().cpu()
    latent = latent.to(alpha.dtype)  # in which a number may be too large
    found = [
        is_active, tiers != 0, tiers > ACTIVE, ~torch.isfinite(latent) | (is_active & (latent != 0)),
        alpha.masked_fill(is_active, 0) != 0, ~torch.isfinite(alpha),
    ]  # fmt: skip
    counts = torch.stack([torch.count_nonzero(entries) for entries in found]).to(parameter.device)
    active, updated, unknown, misplaced, not_zero, not_finite = sharding.sum(counts).tolist()
    if unknown or (sizes is not None and (active != sizes[0] or updated not in sizes)):
        return f"its tiers hold |A| = {active} and |B| = {updated}; the file is damaged"
    if misplaced:
        return "its latent values hold NaN, infinity or active entries; the file is damaged"
    if not_finite:
        return "the model's weight holds NaN or infinity; use another checkpoint"
    if not_zero:
        return (
            "the model's weight is not zero outside the saved active set; "
            "load the model's own state dict of the same checkpoint first"
        )
    return None


def holds_values(tensor: Tensor) -> bool:
    """Return whether a tensor that was read from a file is strided and not on the meta device."""
    return tensor.layout is torch.strided and not tensor.is_meta
