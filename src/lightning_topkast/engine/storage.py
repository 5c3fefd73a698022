"""How each sparse weight is kept: masked, packed or compact."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import nn

from lightning_topkast.distributed import from_rank_0_
from lightning_topkast.errors import TopKastError
from lightning_topkast.layers import SparseLayer, pack_layer, product_of, unpack_layer
from lightning_topkast.method.structure import Blocks
from lightning_topkast.method.targets import Target
from lightning_topkast.ops import Operators, choose_operators
from lightning_topkast.settings import Execution, Settings
from lightning_topkast.weights import MaskedWeight, PackedWeight, SparseWeight

# What a packed product takes for an entry, as a multiple of what a dense one does, and the entries below which the
# fixed cost of a layer eats the gain: measured on CPUs at batches of 128 and 256 (benchmarks/README.md, packed mode).
_COST_OF_ENTRY = {"torch": 5.0, "compiled": 3.2}
_LEAST_ENTRIES = 1 << 16


def make_weights(
    targets: Sequence[Target], counts: Mapping[str, tuple[int, int]], settings: Settings
) -> dict[str, SparseWeight]:
    """Make every target's weight, kept as the settings ask for; the model is not changed yet.

    Raises:
        TopKastError: `strict` and a weight that could only be masked, or compiled operators that can't be had.
    """
    weights: dict[str, SparseWeight] = {}
    left_masked: list[str] = []
    operators, units = "", settings.chosen_granularity
    if isinstance(units, Blocks):
        operators = settings.operators  # between them is chosen where the model computes, which may be elsewhere
    for target in targets:
        active, updated = counts[target.name]
        kept, obstacle = kept_as(target, active, updated, settings.execution, settings)
        if obstacle:
            left_masked.append(f"'{target.name}' ({obstacle})")
        if kept == "masked":
            weights[target.name] = MaskedWeight(target.name, target.parameter, active, updated)
            continue
        if not units.divides(target.shape):
            raise TopKastError(
                f"'{target.name}' of shape {tuple(target.shape)} is no multiple of the {units}: its updated set's "
                f"size would vary, which execution='{settings.execution}' has no room for: exclude it, choose "
                "another block_shape, or train with execution='masked'"
            )
        from_rank_0_(target.parameter)
        if kept == "packed":
            operators = operators or _operators_for_entries(settings, target.parameter.device)
        weights[target.name] = PackedWeight(
            target.name, target.parameter, active, updated, units, kept == "packed", operators
        )
    for weight in weights.values():
        weight.forgets, weight.granularity = settings.chosen_rule.forgets, units
        weight.sizes_vary = settings.sizes_vary or not units.divides(weight.shape)
        weight.exponent = float(settings.powerpropagation)
    if left_masked:
        what = f"execution='{settings.execution}' leaves {', '.join(left_masked)} masked"
        if settings.strict:
            raise TopKastError(f"{what}, which strict=True refuses; exclude them, or set strict=False")
        warnings.warn(f"{what}: dense tensors that hold zeros", stacklevel=2)
    return weights


def kept_as(
    target: Target, active: int, updated: int, execution: Execution, settings: Settings
) -> tuple[Literal["masked", "packed", "compact"], str]:
    """How a weight with these sizes of A and B is kept, and what leaves it masked against `execution` ("": nothing).

    Raises:
        TopKastError: `execution="auto"` and compiled operators that can't be had.
    """
    obstacle = "" if execution == "masked" else _obstacle(target)
    if obstacle or execution == "masked":
        return "masked", obstacle
    if execution == "compact" or not all(product_of(*owner) for owner in target.owners):
        return "compact", ""
    if execution == "auto":
        parameter = target.parameter
        # what has no memory yet is given some on the CPU
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if isinstance(settings.chosen_granularity, Blocks):
            cost = _cost_in_blocks(settings.block_shape)
        else:
            cost = _COST_OF_ENTRY[_operators_for_entries(settings, device)]
        if not _pays(active, updated, parameter.numel(), cost):
            return "compact", ""
    return "packed", ""


def install(target: Target, weight: SparseWeight) -> None:
    """Make the layers of `target` hold a packed `weight`; the dense parameter is let go."""
    if not isinstance(weight, PackedWeight):
        return
    for module, name in target.owners:
        kind = product_of(module, name) if weight.execution == "packed" else None
        pack_layer(module, name, weight, kind or SparseLayer)
    target.parameter = weight.parameter


def release(target: Target, weight: SparseWeight) -> None:
    """Give the model an ordinary dense weight again, which is θ."""
    if isinstance(weight, MaskedWeight):
        weight.release()
        return
    parameter = weight.parameter
    theta = weight.theta().to(parameter.device, parameter.dtype)
    target.parameter = nn.Parameter(theta, requires_grad=parameter.requires_grad)
    for module, name in target.owners:
        unpack_layer(module, name, target.parameter)


def _obstacle(target: Target) -> str:
    """Why a weight can't be packed, or ""."""
    parameter = target.parameter
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "it has hooks of its own, which expect a dense gradient"
    for module, name in target.owners:
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            return "it is parametrized"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{type(module).__name__} is compiled by TorchScript"
        if name not in module._parameters or getattr(type(module), name, None) is not None:
            return f"{type(module).__name__} computes its '{name}' itself"
    return ""


def _operators_for_entries(settings: Settings, device: torch.device) -> str:
    return choose_operators(cast(Operators, settings.operators), device)


def _cost_in_blocks(sides: Sequence[int]) -> float:
    """Fitted to squares of 16, 32 and 64 on a CPU; a GPU takes less where blocks are large."""
    return 2 + 40 / min(sides)


def _pays(active: int, updated: int, size: int, cost: float) -> bool:
    """Whether a packed step's products (two with A, one on B) are expected to be faster than three dense ones."""
    return size >= _LEAST_ENTRIES and cost * (2 * active + updated) < 3 * size
