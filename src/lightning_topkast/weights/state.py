"""The saved state of a sparse weight, which every way of keeping one shares."""

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
    sizes_vary: bool = False,
) -> str | None:
    """What is wrong with a weight's saved state, or None; on every process that holds a part, if it is on one.

    Args:
        state: as it was saved; tensors in the weight's shape, whole or DTensors.
        parameter: this process' part of the weight that holds the saved α.
        active_count: |A|.
        updated_count: |B| while exploring.
        sharding: of the weight; what is counted is summed over all parts.
        sizes_vary: whether the sets may have other sizes than these.
    """
    problem = _misfit(state, active_count, updated_count, sharding.shape)
    elsewhere = sharding.sum(torch.tensor(int(problem is not None), device=parameter.device))
    if problem is not None or int(elsewhere):
        return problem or "another process could not use what it was given"
    return _damage(state, parameter, None if sizes_vary else (active_count, updated_count), sharding)


def _misfit(state: Any, active_count: int, updated_count: int, shape: torch.Size) -> str | None:
    """What is seen without looking at the values."""
    kinds = {"tiers": Tensor, "reserve": Tensor, "dormant": Tensor, "first_reservoir": int, "promoted": int,
             "active_count": int, "updated_count": int, "strength": float}  # fmt: skip
    if not isinstance(state, dict):
        return f"expected a dict, found {type(state).__name__}"
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            return f"'{key}' should be a {kind.__name__}, found {type(state.get(key)).__name__}"
    for key, dtypes in {"tiers": (torch.uint8,), "dormant": (torch.bool,), "reserve": _FLOATING}.items():
        tensor = state[key]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            return f"'{key}' is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {tuple(shape)}"
        if not holds_values(tensor):
            return f"'{key}' is a tensor on {tensor.device} in layout {tensor.layout}, expected a dense one with values"
    if (state["active_count"], state["updated_count"]) != (active_count, updated_count):
        return (
            f"it was saved with |A| = {state['active_count']} and |B| = {state['updated_count']}, this run asks "
            f"for {active_count} and {updated_count}; resume with the sparsities and distribution it had"
        )
    if not (math.isfinite(state["strength"]) and state["strength"] >= 0):
        return f"'strength' is {state['strength']}, expected a number of at least 0; the file is damaged"
    for key in ("first_reservoir", "promoted"):
        if not 0 <= state[key] <= shape.numel():
            return f"'{key}' is {state[key]}, expected a count of its {shape.numel()} entries; the file is damaged"
    execution = state.get("execution", "masked")
    if execution not in ("masked", "packed", "compact"):
        return f"its execution {execution!r:.60} is unknown; the file is damaged"
    return None


def _damage(
    state: Mapping[str, Any], parameter: Tensor, sizes: tuple[int, int] | None, sharding: Sharding
) -> str | None:
    """What is wrong with the values, and with the sizes of the sets unless those vary."""
    tiers, reserve = (sharding.part_of(state[key].detach()).cpu() for key in ("tiers", "reserve"))
    is_active, alpha = tiers == ACTIVE, parameter.detach().cpu()
    reserve = reserve.to(alpha.dtype)  # where a number may be too large
    found = [
        is_active, tiers != 0, tiers > ACTIVE, ~torch.isfinite(reserve) | (is_active & (reserve != 0)),
        alpha.masked_fill(is_active, 0) != 0, ~torch.isfinite(alpha),
    ]  # fmt: skip
    counts = torch.stack([torch.count_nonzero(entries) for entries in found]).to(parameter.device)
    active, updated, unknown, misplaced, not_zero, not_finite = sharding.sum(counts).tolist()
    if unknown or (sizes is not None and (active != sizes[0] or updated not in sizes)):
        return f"its tiers hold |A| = {active} and |B| = {updated}; the file is damaged"
    if misplaced:
        return "its reserve holds NaN, infinity or active entries; the file is damaged"
    if not_finite:
        return "the model's weight holds NaN or infinity; take another checkpoint"
    if not_zero:
        return (
            "the model's weight is not zero outside the saved active set; "
            "load the model's own state dict of the same checkpoint first"
        )
    return None


def holds_values(tensor: Tensor) -> bool:
    """Whether a tensor read from a file is an ordinary one, neither sparse nor without memory."""
    return tensor.layout is torch.strided and not tensor.is_meta
