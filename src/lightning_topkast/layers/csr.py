"""Linear layers in compressed form, for inference."""

import torch
from torch import Tensor, nn

from lightning_topkast.errors import TopKastError
from lightning_topkast.layers.sparse_layer import to_dense
from lightning_topkast.ops import Operators, Pattern, choose_operators, sparse_linear


class CsrLinear(nn.Module):
    """A linear layer that stores its weight's non-zero entries only and multiplies by them, without gradients.

    Args:
        weight: (out × in), dense with zeros.
        bias: (out,) or None.
        operators: see `TopKastCallback`.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, operators: Operators = "auto") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.operators = operators
        flat = weight.detach().cpu().contiguous().view(-1)
        places = torch.nonzero(flat).flatten()
        pattern = Pattern.from_flat(places, (self.out_features, self.in_features), transpose=False)
        self.register_buffer("crow", pattern.crow.to(weight.device))
        self.register_buffer("col", pattern.col.to(weight.device))
        self.register_buffer("values", flat[places].to(weight.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in) → (..., out)."""
        none = self.col[:0]
        active = Pattern((self.out_features, self.in_features), self.crow, self.col, none, none, none)
        nothing = Pattern((self.out_features, self.in_features), torch.zeros_like(self.crow), none, none, none, none)
        operators = choose_operators(self.operators, input.device)
        return sparse_linear(input, self.values, self.bias, active, nothing, operators)

    @property
    def weight(self) -> Tensor:
        """The weight (out × in), dense, made when it is read."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, shape, check_invariants=False).to_dense()

    def extra_repr(self) -> str:
        """Sizes and density."""
        density = self.values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.4f}"


def to_csr(model: nn.Module, max_density: float = 0.5, operators: Operators = "auto") -> nn.Module:
    """Make the sparse linear layers of a trained model compressed ones for inference, in place.

    Takes packed models, and plain ones whose weights hold zeros. Other packed layers become ordinary ones.

    Args:
        model: the trained model.
        max_density: layers with a larger share of non-zero entries stay as they are.
        operators: see `TopKastCallback`.

    Returns:
        the model.

    Raises:
        TopKastError: the model is itself a single linear layer.
    """
    to_dense(model)
    made: dict[int, CsrLinear] = {}
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):  # named_children() leaves out a layer's second place
            weight = None if module is None else _matrix(module)
            if weight is not None and int(torch.count_nonzero(weight)) <= max_density * weight.numel():
                if id(module) not in made:
                    made[id(module)] = CsrLinear(weight, module.bias, operators)  # type: ignore[arg-type, union-attr]
                parent._modules[name] = made[id(module)]
    if _matrix(model) is not None:
        raise TopKastError(
            "to_csr replaces layers inside a model; make a CsrLinear of a single layer's weight and bias"
        )
    return model


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight (out × in) of a linear layer, None of any other."""
    kind = type(module)
    if kind is nn.Linear:
        return module.weight.detach()  # type: ignore[operator]
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return module.weight.detach().t()  # type: ignore[operator]
    return None
