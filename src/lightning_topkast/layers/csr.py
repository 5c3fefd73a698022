"""Linear layers with CSR weights, for inference."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_topkast.errors import TopKastError
from lightning_topkast.layers.sparse_layer import to_dense
from lightning_topkast.ops import MATRIX_KERNELS, CsrPattern, EntryPattern, Kernels, Pattern, sparse_linear


class CsrLinear(nn.Module):
    """A linear layer that stores and multiplies by only the non-zero entries of its weight, without gradients.

    Args:
        weight: (out × in), dense with zeros.
        bias: (out,) or None.
        kernels: see `Packed`.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernels = kernels
        flat = weight.detach().cpu().contiguous().view(-1)
        places = torch.nonzero(flat).flatten()
        pattern = Pattern.from_flat(places, (self.out_features, self.in_features), transpose=False)
        self.register_buffer("crow", pattern.crow.to(weight.device))
        self.register_buffer("col", pattern.col.to(weight.device))
        self.register_buffer("values", flat[places].to(weight.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._compiled = self._for_compiled_kernels()

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) → (..., out)."""
        kernels = MATRIX_KERNELS.choose(self.kernels, input.device)
        if kernels == "compiled" and self._compiled is not None:
            return sparse_linear(input, self.values, self.bias, self._compiled)
        nothing = self._pattern(torch.zeros_like(self.crow), self.col[:0])
        return sparse_linear(input, self.values, self.bias, CsrPattern(self._pattern(self.crow, self.col), nothing))

    def _pattern(self, crow: Tensor, col: Tensor) -> Pattern:
        none = self.col[:0]
        return Pattern((self.out_features, self.in_features), crow, col, none, none, none)

    def _for_compiled_kernels(self) -> EntryPattern | None:
        """Return the places as the compiled kernels use them; None where they are not used."""
        if self.crow.device.type != "cpu" or MATRIX_KERNELS.choose(self.kernels, self.crow.device) == "torch":
            return None
        places = torch.empty(self.col.numel(), dtype=torch.int64)
        self._pattern(self.crow, self.col).write_indices(places)
        return EntryPattern.from_flat(places, places[:0], (self.out_features, self.in_features, 1, 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        known = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if len(errors) > known:  # such as sizes that do not fit
            return
        try:
            if int(self.crow[-1]) != self.col.numel():
                raise ValueError(f"expected {int(self.crow[-1])} columns, got {self.col.numel()}")
            self._compiled = self._for_compiled_kernels()
        except ValueError as error:
            errors.append(f"{prefix}crow and {prefix}col are no compressed rows: {error}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a layer, also one that was saved before it had places for the compiled kernels."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_compiled" not in state:
            self._compiled = self._for_compiled_kernels()

    @property
    def weight(self) -> Tensor:
        """The weight (out × in), dense, computed at each access."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, shape, check_invariants=False).to_dense()

    def extra_repr(self) -> str:
        """Return sizes and density as text."""
        density = self.values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.4f}"


def to_csr(model: nn.Module, max_density: float = 0.5, kernels: Kernels = "auto") -> nn.Module:
    """Replace the sparse linear layers of a trained model with CSR layers for inference, in place.

    The model may be packed, or have ordinary layers whose weights contain zeros. Other packed layers become ordinary.

    Args:
        model: the trained model.
        max_density: layers with a larger share of non-zero entries are not replaced.
        kernels: see `Packed`.

    Returns:
        the model.

    Raises:
        TopKastError: the model is a single linear layer.
    """
    to_dense(model)
    made: dict[int, CsrLinear] = {}
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):  # named_children() lists a shared layer only once
            weight = None if module is None else _matrix(module)
            if weight is not None and int(torch.count_nonzero(weight)) <= max_density * weight.numel():
                if id(module) not in made:
                    made[id(module)] = CsrLinear(weight, module.bias, kernels)  # type: ignore[arg-type, union-attr]
                parent._modules[name] = made[id(module)]
    if _matrix(model) is not None:
        raise TopKastError(
            "to_csr replaces layers inside a model; for a single layer, create a CsrLinear from its weight and bias"
        )
    return model


def _matrix(module: nn.Module) -> Tensor | None:
    """Return the weight (out × in) of a linear layer, or None for other layers."""
    kind = type(module)
    if kind is nn.Linear:
        return module.weight.detach()  # type: ignore[operator]
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return module.weight.detach().t()  # type: ignore[operator]
    return None
