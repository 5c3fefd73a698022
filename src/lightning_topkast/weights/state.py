"""The saved state of a sparse weight, which every way of keeping one shares."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.selection import ACTIVE

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem_with(state: Any, parameter: Tensor, active_count: int, updated_count: int) -> str | None:
    """What is wrong with a weight's saved state for a parameter that holds its α, or None."""
    kinds = {"tiers": Tensor, "reserve": Tensor, "dormant": Tensor, "first_reservoir": int, "promoted": int,
             "active_count": int, "updated_count": int, "strength": float}  # fmt: skip
    if not isinstance(state, dict):
        return f"expected a dict, found {type(state).__name__}"
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            return f"'{key}' should be a {kind.__name__}, found {type(state.get(key)).__name__}"
    shape = parameter.shape
    for key, dtypes in {"tiers": (torch.uint8,), "dormant": (torch.bool,), "reserve": _FLOATING}.items():
        tensor = state[key]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            return f"'{key}' is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {tuple(shape)}"
    if (state["active_count"], state["updated_count"]) != (active_count, updated_count):
        return (
            f"it was saved with |A| = {state['active_count']} and |B| = {state['updated_count']}, this run asks "
            f"for {active_count} and {updated_count}; resume with the sparsities and distribution it had"
        )
    if not (math.isfinite(state["strength"]) and state["strength"] >= 0):
        return f"'strength' is {state['strength']}, expected a number of at least 0; the file is damaged"
    tiers = state["tiers"].cpu()
    active, updated = int((tiers == ACTIVE).sum()), int((tiers != 0).sum())
    if int(tiers.max()) > ACTIVE or active != active_count or updated not in (active, updated_count):
        return f"its tiers hold |A| = {active} and |B| = {updated}; the file is damaged"
    if not bool(torch.isfinite(state["reserve"]).all()) or bool(state["reserve"].cpu()[tiers == ACTIVE].any()):
        return "its reserve holds NaN, infinity or active entries; the file is damaged"
    if bool(parameter.detach().cpu().masked_fill(tiers == ACTIVE, 0).any()):
        return (
            "the model's weight is not zero outside the saved active set; "
            "load the model's own state dict of the same checkpoint first"
        )
    return None
