"""Choosing the storage of each sparse weight, and putting weights into the model and out again."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_topkast.distributed import HostGroup, Sharding, from_rank_0_, host_group
from lightning_topkast.engine.materialize import materialize
from lightning_topkast.errors import TopKastError
from lightning_topkast.layers import SparseLayer, StackLayer, pack_layer, product_of, products_of, unpack_layer
from lightning_topkast.method.density import Counts
from lightning_topkast.method.structure import Block, Structure
from lightning_topkast.method.targets import Target, find_targets
from lightning_topkast.ops import CONV_KERNELS, MATRIX_KERNELS, Kernels, cost_of_conv
from lightning_topkast.settings import Settings
from lightning_topkast.storage import Masked, Packed
from lightning_topkast.weights import MaskedWeight, PackedWeight, SparseWeight, Traits
from lightning_topkast.weights.home import can_share
from lightning_topkast.weights.layouts import Product, can_multiply

# Time of a packed product per entry, as a multiple of a dense product's, and the number of entries below which the
# fixed cost of a layer outweighs the gain: the most that was measured on CPUs at batches of 32 to 512
# (benchmarks/README.md, packed mode).
_COST_OF_ENTRY = {"torch": 5.0, "compiled": 2.4}
_LEAST_ENTRIES = 1 << 16
_LEAST_ENTRIES_OF_CONV = 1 << 12  # each is used for every pixel


def check_targets(sparse: Sequence[Target], settings: Settings, taken: Collection[str]) -> None:
    """Refuse weights for which the settings are not supported."""
    for target in sparse:
        if target.name in taken:
            raise TopKastError(
                f"'{target.name}' is already sparse through another TopKast; use include and exclude so that their "
                "targets do not overlap"
            )
        if any(getattr(module, "sparse", False) is True for module, _ in target.owners):
            raise TopKastError(
                f"'{target.name}' has sparse gradients, which cannot be masked; create its embedding with "
                "sparse=False, or exclude it"
            )
        if not isinstance(target.parameter, DTensor):
            continue
        if target.is_stack and Sharding(target.name, target.parameter).sharded_dims - {0}:
            raise TopKastError(
                f"'{target.name}' of shape {tuple(target.shape)} is a stack of matrices (experts), each with sets of "
                "its own, and every matrix is sharded over devices, which is not supported: shard only its first "
                "dimension (as FSDP2 does by default), or exclude it"
            )
        if settings.allocation.competes:
            raise TopKastError(
                f"'{target.name}' is sharded over devices (FSDP2 or tensor parallel), which distribution="
                f"'{settings.allocation.distribution}' does not support; use distribution='uniform' or 'erk'"
            )
        if settings.storage.name != "masked":
            raise TopKastError(
                f"'{target.name}' is sharded over devices already (FSDP2 or tensor parallel), and storage="
                f"'{settings.storage.name}' replaces it: make TopKast before fully_shard (with Lightning, build the "
                "layers in __init__ or setup and shard them in configure_model), or use storage='masked'"
            )
        if settings.schedule.delay:
            raise TopKastError(
                f"'{target.name}' is sharded over devices (FSDP2 or tensor parallel): expected delay=0 with "
                f"storage='masked', got {settings.schedule.delay}"
            )


def sharing(storage: Masked | Packed) -> HostGroup | None:
    """Return the processes that share θ of packed weights; None if each has all of it."""
    return host_group() if isinstance(storage, Packed) and storage.theta == "sharded" else None


def draw(model: nn.Module, settings: Settings) -> dict[nn.Parameter, nn.Parameter]:
    """Draw what is on the meta device; see `materialize`.

    Returns:
        parameter → its values, of those that stay on the meta device until they are packed, since processes share them.
    """
    if settings.storage.name == "masked":
        return {}
    group, shared = sharing(settings.storage), set()
    if group is not None:
        for target in find_targets(model, settings.targets):
            dense = target.parameter
            is_drawn = target.sparse and dense.is_meta and dense.is_contiguous()  # as numbers are drawn, in order
            if is_drawn and can_share(dense.shape) and not _obstacle(target):
                shared.add(dense)
    return materialize(model, shared, group)


def make_weights(
    targets: Sequence[Target], counts: Counts, storage: Masked | Packed, traits: Traits
) -> dict[str, SparseWeight]:
    """Make the weight of every target, without changing the model yet.

    Args:
        targets: parameters to be sparse.
        counts: weight name → |A| and |B|.
        storage: the storage setting of the run.
        traits: properties that all weights share.

    Raises:
        TopKastError: a weight cannot be packed and unsupported="error", blocks do not divide a weight to be packed, or
            compiled kernels are not available.
    """
    group = sharing(storage)
    weights: dict[str, SparseWeight] = {}
    choices: dict[str, StorageChoice] = {}
    for target in targets:
        active, updated = counts[target.name]
        own = replace(traits, structure=target.structure(traits.structure))
        choice = choices[target.name] = choose_storage(target, active, updated, storage, own.structure)
        if choice.name == "masked":
            weights[target.name] = MaskedWeight(target.name, target.parameter, active, updated, own)
            continue
        if not own.structure.divides(target.shape):
            raise TopKastError(
                f"'{target.name}' of shape {tuple(target.shape)} is not a multiple of the {traits.structure}, so the "
                f"size of its updated set would change, which storage='{storage.name}' does not support: exclude it, "
                "choose another block size, or train with storage='masked'"
            )
        if not isinstance(target.parameter, DTensor):  # of which no other process has the same rows
            from_rank_0_(target.parameter)
        weights[target.name] = PackedWeight(target.name, target.parameter, active, updated, own, choice.product, group)
    for name, weight in weights.items():
        weight.storage_reason = choices[name].reason
    left_masked = [f"'{name}' ({choice.reason})" for name, choice in choices.items() if choice.name == "masked"]
    if left_masked and isinstance(storage, Packed):
        refuse_or_warn(storage, left_masked)
    return weights


def refuse_or_warn(storage: Packed, left_masked: Sequence[str]) -> None:
    """Raise or warn about weights that stay masked, according to `storage.unsupported`.

    Args:
        storage: the storage setting of the run.
        left_masked: names of the weights, with the reasons.

    Raises:
        TopKastError: unsupported="error".
    """
    what = f"storage='{storage.name}' leaves {', '.join(left_masked)} masked"
    if storage.unsupported == "error":
        raise TopKastError(f"{what}, which unsupported='error' refuses; exclude them, or set unsupported='masked'")
    warnings.warn(f"{what}: dense tensors that hold zeros", stacklevel=3)


@dataclass(frozen=True)
class StorageChoice:
    """The storage of one weight.

    Args:
        name: of the storage.
        product: how the layer multiplies by it if it is packed.
        reason: why the weight stays masked or is compact although packing was requested, what "auto" expects of it, or
            by what it is multiplied where that depends on the device; "" if it is as requested.
    """

    name: Literal["masked", "packed", "compact"]
    product: Product | None = None
    reason: str = ""


def choose_storage(
    target: Target, active: int, updated: int, storage: Masked | Packed, structure: Structure
) -> StorageChoice:
    """Choose the storage of one weight.

    Args:
        target: the parameter.
        active: |A|.
        updated: |B|.
        storage: the storage setting of the run.
        structure: what the sets consist of.

    Raises:
        TopKastError: kernels="compiled" and compiled kernels are not available.
    """
    if isinstance(storage, Masked):
        return StorageChoice("masked")
    if obstacle := _obstacle(target):
        return StorageChoice("masked", reason=obstacle)
    if storage.products == "dense":
        return StorageChoice("compact")
    product = _packed_product(target, active, updated, storage, structure)
    if isinstance(product, str):
        return StorageChoice("compact", reason=product)
    if isinstance(structure, Block) and product.groups is not None and product.kernels == "auto":
        reason = "multiplied by blocks where that should be faster, and by a dense copy elsewhere"
        return StorageChoice("packed", product, reason)
    if storage.products == "sparse":
        return StorageChoice("packed", product)
    entries, least = target.shape.numel(), _LEAST_ENTRIES if product.groups is None else _LEAST_ENTRIES_OF_CONV
    if entries < least:
        return StorageChoice("compact", reason=f"fewer than {least:,} entries")
    # of three dense products, two with A and one on B
    speed = 3 * entries / max(_cost(structure, product) * (2 * active + updated), 1)
    reason = f"packed products should take {1 / speed:.2g} times as long as dense ones"
    return StorageChoice("packed", product, reason) if speed > 1 else StorageChoice("compact", reason=reason)


def install(target: Target, weight: SparseWeight) -> None:
    """Make the layers of `target` hold a packed `weight` in place of the dense parameter."""
    if not isinstance(weight, PackedWeight):
        return
    for module, name in target.owners:
        kind = product_of(module, name) if weight.storage == "packed" else None
        pack_layer(module, name, weight, kind or (StackLayer if target.is_stack else SparseLayer))
    target.parameter = weight.parameter


def release(target: Target, weight: SparseWeight) -> None:
    """Put θ back into the model as an ordinary dense weight."""
    if isinstance(weight, MaskedWeight):
        weight.release()
        return
    parameter, theta = weight.parameter, weight.theta()
    theta = theta.to(parameter.device, parameter.dtype)
    target.parameter = nn.Parameter(theta, requires_grad=parameter.requires_grad)
    for module, name in target.owners:
        unpack_layer(module, name, target.parameter)


def _obstacle(target: Target) -> str:
    """Return why a weight cannot be packed, or "" if it can."""
    parameter = target.parameter
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "it has hooks, which expect a dense gradient"
    for module, name in target.owners:
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            return "it is parametrized"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{type(module).__name__} is compiled by TorchScript"
        if name not in module._parameters or getattr(type(module), name, None) is not None:
            return f"{type(module).__name__} computes its '{name}' itself"
    return ""


def _packed_product(target: Target, active: int, updated: int, storage: Packed, structure: Structure) -> Product | str:
    """Return the fastest way in which all layers of a weight can multiply by its packed values, or why there is none.

    Raises:
        TopKastError: kernels="compiled" and compiled kernels are not available.
    """
    # a parameter on the meta device will be initialized on the CPU
    device = torch.device("cpu") if target.parameter.is_meta else target.parameter.device
    first, *others = [products_of(*owner) for owner in target.owners]
    if isinstance(structure, Block):
        first.reverse()  # the blocks of a 1×1 kernel are those of a matrix, for which no pixels are shifted
    obstacle = "its layer has no product with packed values"
    for product in first:
        if not all(product in products for products in others):
            continue
        if not can_multiply(target.shape, active, updated, structure, product):
            obstacle = "the indices do not fit the kernels"
        elif kernels := _kernels_for(product, structure, storage, device):
            return replace(product, kernels=kernels)
        else:
            obstacle = "there are no kernels for its product"
    return obstacle


def _kernels_for(product: Product, structure: Structure, storage: Packed, device: torch.device) -> str:
    """Return the kernels for a product, or "" if there are none."""
    if isinstance(structure, Block):
        # they are chosen at run time, since the model may compute on another device
        return storage.kernels if product.groups in (None, 1) else ""
    kernels = cast(Kernels, storage.kernels)
    if product.groups is None:
        return MATRIX_KERNELS.choose(kernels, device)
    return "" if CONV_KERNELS.choose(kernels, device) == "torch" else "compiled"


def _cost(structure: Structure, product: Product) -> float:
    """Return the time of a product per entry, relative to a dense one."""
    if isinstance(structure, Block):
        if product.groups is not None:
            return cost_of_conv((structure.outputs, structure.inputs))
        # fitted to square blocks of side 16, 32 and 64 on a CPU; a GPU takes less for large blocks
        return 2 + 40 / min(structure.outputs, structure.inputs)
    return _COST_OF_ENTRY[product.kernels]
