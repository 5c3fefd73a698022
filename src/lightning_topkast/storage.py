"""How sparse weights are stored, and with which kernels their layers multiply."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_topkast.checks import check_bool, check_choice
from lightning_topkast.errors import TopKastError

Kernels = Literal["auto", "torch", "compiled", "triton"]
Products = Literal["sparse", "dense", "auto"]
Theta = Literal["sharded", "replicated"]
Unsupported = Literal["masked", "error"]


@dataclass(frozen=True)
class Masked:
    """Dense tensors that hold zeros: works for every layer and simulates sparsity, but saves no time and no memory.

    Args:
        reset_optimizer_state: zero the optimizer's state of entries that leave the updated set.

    Raises:
        TopKastError: a value that is not one of these.
    """

    name: ClassVar[str] = "masked"

    reset_optimizer_state: bool = True

    def __post_init__(self) -> None:
        check_bool("reset_optimizer_state", self.reset_optimizer_state)


@dataclass(frozen=True)
class Packed:
    """Only the values of the updated set: parameter, gradient and optimizer state are as small as that.

    Args:
        kernels: which kernels multiply by packed weights: "compiled" (C++ on CPU, built on first use) for unstructured
            sets, "triton" (GPU) for blocks, PyTorch's own ("torch"), or the fastest available ones ("auto").
        unsupported: whether weights that cannot be packed stay "masked", with a warning, or are an "error".
        products: "sparse" multiplies by the packed values in Linear, Conv1d, Conv2d, GPT-2's Conv1D and self-attention,
            and makes a dense weight for every pass of other layers; "dense" makes one for every layer; "auto"
            multiplies by packed values where that is expected to be faster.
        theta: what each process keeps in host memory of θ and the sets if several train the same weights (DDP): a
            share of the rows ("sharded"), or all of it ("replicated").

    Raises:
        TopKastError: a value that is not one of these.
    """

    kernels: Kernels = "auto"
    unsupported: Unsupported = "masked"
    products: Products = "sparse"
    theta: Theta = "sharded"

    def __post_init__(self) -> None:
        check_choice("kernels", self.kernels, Kernels)
        check_choice("unsupported", self.unsupported, Unsupported)
        check_choice("products", self.products, Products)
        check_choice("theta", self.theta, Theta)
        if self.products == "dense" and self.kernels != "auto":
            raise TopKastError(f"products='dense' uses no sparse kernels: leave out kernels={self.kernels!r}")

    @property
    def name(self) -> str:
        """The string that is short for storage with these products."""
        return {"sparse": "packed", "dense": "compact", "auto": "auto"}[self.products]


STORAGES: dict[str, Masked | Packed] = {
    "masked": Masked(),
    "packed": Packed(),
    "compact": Packed(products="dense"),
    "auto": Packed(products="auto"),
}
