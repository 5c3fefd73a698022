"""What is done with a LightningModule at moments for which callbacks have no hook."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_topkast.weights import SparseWeight

# PyTorch's own operations as autograd names them. Packed layers use their parameter through operations of ours or of a
# compiler, whose names have no number, after at most a change of shape or precision.
_BUILT_IN = re.compile(r"(?!View|ToCopy)\w+Backward\d+")


def after_setup(pl_module: LightningModule, then: Callable[[], None]) -> None:
    """Call `then` once, right after the next `LightningModule.setup`."""
    own = pl_module.__dict__.get("setup")
    setup = pl_module.setup

    def setup_and_then(*arguments: Any, **options: Any) -> None:
        pl_module.__dict__.pop("setup")
        if own is not None:
            pl_module.__dict__["setup"] = own
        setup(*arguments, **options)
        then()

    setup_and_then.own = own  # type: ignore[attr-defined]
    pl_module.__dict__["setup"] = setup_and_then


def undo_after_setup(pl_module: LightningModule) -> None:
    """Undo `after_setup`, since the setup was never reached."""
    while hasattr(setup := pl_module.__dict__.get("setup"), "own"):
        del pl_module.__dict__["setup"]
        if setup.own is not None:  # type: ignore[union-attr]
            pl_module.__dict__["setup"] = setup.own  # type: ignore[union-attr]


def warn_of_packed_in_loss(loss: Tensor, weights: Mapping[str, SparseWeight]) -> None:
    """Warn by name of packed parameters that a loss uses by itself, not through their layers."""
    packed = {id(weight.parameter): name for name, weight in weights.items() if weight.is_packed}
    if not packed:
        return
    used = ((packed.get(id(leaf)), user) for leaf, user in _leaves(loss.grad_fn))
    found = sorted({name for name, user in used if name is not None and _BUILT_IN.fullmatch(user)})
    if found:
        warnings.warn(
            f"the loss uses the parameters of packed weights by themselves: {', '.join(found[:5])}. They are 1-D and "
            "hold θ of the updated set in an order that changes at every refresh, so the loss differs from that of a "
            "masked run; use the `weight` of the layers, which is α in the weight's shape, or storage='masked'",
            stacklevel=2,
        )


def _leaves(root: Any) -> Iterator[tuple[Any, str]]:
    """Yield the parameters of an autograd graph, each with the name of the operation that uses it."""
    seen, stack = {None}, [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                yield following.variable, node.name()
            stack.append(following)
