"""FLOPs of a model's products, counted during one run of the model; on the meta device without memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from lightning_topkast.errors import TopKastError

aten = torch.ops.aten


@dataclass
class Products:
    """FLOPs of products; a multiplication and an addition count as two, as in PyTorch's `FlopCounterMode`.

    Attributes:
        forward: of the products themselves.
        of_input: of the backward products for the gradients of the inputs.
        of_weight: of the backward products for the gradient of the weight.
    """

    forward: int = 0
    of_input: int = 0
    of_weight: int = 0

    @property
    def training(self) -> int:
        """FLOPs of forward and backward pass."""
        return self.forward + self.of_input + self.of_weight

    def scaled(self, density: float, updated_density: float) -> "Products":
        """Return the FLOPs for a weight with these forward and backward densities."""
        return Products(
            round(self.forward * density), round(self.of_input * density), round(self.of_weight * updated_density)
        )


def count_products(
    model: nn.Module, inputs: Sequence[Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Products], dict[str, Products]]:
    """Run `model(*inputs)` once and count its products with weights and those of activations.

    Every use of a weight counts. The backward pass of a product has one product of the same size for each operand that
    requires a gradient. Elementwise operations, reductions and embedding lookups are not counted.

    Args:
        model: the model, on any device; on meta nothing is computed.
        inputs: its positional arguments, on the same device.
        weights: parameters by the names under which they are counted.

    Returns:
        the products by weight, and the other products (such as those of attention) by module.

    Raises:
        TopKastError: the model fails on these inputs.
    """
    with ModuleTracker() as tracker, _Counter(weights, tracker) as counter:
        try:
            with torch.enable_grad():
                model(*inputs)
        except Exception as error:
            given = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
            raise TopKastError(
                f"{type(model).__name__} fails on an input of shape {given or inputs} ({type(error).__name__}: "
                f"{error}). A plan runs it once on tensors without values (the meta device)"
            ) from error
    return counter.of_weights, counter.of_activations


class _Counter(TorchDispatchMode):
    """Count every operator below autograd, and recognise weights by the storage that views share."""

    def __init__(self, weights: Mapping[str, Tensor], tracker: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_weights: dict[str, Products] = {}
        self.of_activations: dict[str, Products] = {}
        self._tracker = tracker
        # The tensors are kept too, so that no storage is freed and its address reused.
        self._known: dict[int, tuple[str, Tensor]] = {
            _memory(tensor): (name, tensor) for name, tensor in weights.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func.overloadpacket
        if operator in _COPIES and (found := self._known.get(_memory(args[0]))):
            self._known[_memory(result)] = (found[0], result)
        elif (flops_of := _MORE.get(operator) or flop_registry.get(operator)) is not None:
            self._count(flops_of(*args, **kwargs, out_val=result), _operands(operator, args))
        return result

    def _count(self, flops: int, operands: list[Tensor]) -> None:
        known = [operand for operand in operands if _memory(operand) in self._known]
        learns = torch.is_grad_enabled()
        if len(known) == 1:
            (weight,) = known
            products = self.of_weights.setdefault(self._known[_memory(weight)][0], Products())
            products.of_weight += flops * (learns and weight.requires_grad)
        else:
            weight = None
            products = self.of_activations.setdefault(self._module(), Products())
        products.forward += flops
        for operand in operands:
            if operand is not weight:
                products.of_input += flops * (learns and operand.requires_grad)

    def _module(self) -> str:
        """Return the name of the innermost running module; "" is the model itself."""
        innermost = max(self._tracker.parents - {"Global"}, key=len, default="")
        return innermost.partition(".")[2]  # the root is named by its class


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _operands(operator: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return the factors of a product, without a tensor that is added to it."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if operator in (aten.addmm, aten.baddbmm, aten.addmv):
        return tensors[1:3]
    return tensors[:3] if operator is aten._trilinear else tensors[:2]


def _twice_the_matrix(*args: Any, **_: Any) -> int:
    return 2 * int(max(value.numel() for value in args if isinstance(value, Tensor)))


def _trilinear(first: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * first.shape[0] * weight.numel()


def _grouped(input: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * out_val.numel() * input.shape[-1]


# Products that PyTorch's registry lacks: matrix-vector products, those of nn.Bilinear, and those of tokens with their
# experts.
_MORE: dict[Any, Callable[..., int]] = {
    aten.mv: _twice_the_matrix,
    aten.addmv: _twice_the_matrix,
    aten.dot: _twice_the_matrix,
    aten._trilinear: _trilinear,
}
if hasattr(aten, "_grouped_mm"):  # not in older releases
    _MORE[aten._grouped_mm] = _grouped

# A copy of a weight, in another memory format or dtype, still counts as that weight; so do the experts that are
# gathered from a stack for each token.
_COPIES = (aten.clone, aten._to_copy, aten.index, aten.index_select)
