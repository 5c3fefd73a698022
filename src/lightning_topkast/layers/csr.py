"""Linear layers with CSR weights, for inference."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    _pattern: CsrPattern | EntryPattern
    _made_of: list[tuple[Tensor, int]] | None  # the buffers that the pattern was made of, with their versions

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
        self._make_pattern()

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) → (..., out)."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return F.linear(input, self.weight, self.bias)  # a trace does not hold our operators
        # a graph of torch.compile cannot look at versions: it follows moves and state dicts, not other writes
        if not torch.compiler.is_compiling() and not self._is_current():
            self._make_pattern()
        return sparse_linear(input, self.values, self.bias, self._pattern)

    def _make_pattern(self) -> None:
        """Make the places of the values as the kernels take them.

        Raises:
            ValueError: `crow` and `col` are no compressed rows.
            TopKastError: kernels="compiled" and compiled kernels are not available.
        """
        self._made_of = None
        none = self.col[:0]
        shape = self.out_features, self.in_features
        places = Pattern(shape, self.crow, self.col, none, none, none)
        if self.crow.device.type == "cpu":
            places.check()
        if MATRIX_KERNELS.choose(self.kernels, self.crow.device) == "compiled":
            entries = torch.empty(self.col.numel(), dtype=torch.int64, device="cpu")
            places.write_indices(entries)
            self._pattern = EntryPattern.from_flat(entries, entries[:0], (*shape, 1, 1))
        else:
            nothing = Pattern(shape, torch.zeros_like(self.crow), none, none, none, none)
            self._pattern = CsrPattern(places, nothing)
        self._made_of = [(tensor, _version(tensor)) for tensor in (self.crow, self.col)]

    def _renew_pattern(self) -> None:
        """Make the pattern if that can be: what `to_empty` leaves are no places, and the forward pass says so."""
        with suppress(ValueError, TopKastError):
            self._make_pattern()

    def _is_current(self) -> bool:
        """Return whether the pattern is that of the present buffers, and nobody has written to them since."""
        made_of = self._made_of
        return made_of is not None and all(
            tensor is before and _version(tensor) == version
            for tensor, (before, version) in zip((self.crow, self.col), made_of, strict=True)
        )

    def _apply(self, *args: Any, **kwargs: Any) -> "CsrLinear":
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._renew_pattern()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        known = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if len(errors) > known:  # such as sizes that do not fit
            return
        try:
            self._make_pattern()
        except ValueError as error:
            errors.append(f"{prefix}crow and {prefix}col are no compressed rows: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; it makes its own pattern."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_pattern", "_made_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the pattern for the kernels that are available in this process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._renew_pattern()

    @property
    def weight(self) -> Tensor:
        """The weight (out × in), dense, computed at each access."""
        every = torch.arange(self.out_features, device=self.crow.device)
        rows = torch.repeat_interleave(every, self.crow.diff(), output_size=self.col.numel())
        dense = self.values.new_zeros(self.out_features, self.in_features)
        return dense.index_put((rows, self.col.long()), self.values)

    def extra_repr(self) -> str:
        """Return sizes and density as text."""
        density = self.values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.4f}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
