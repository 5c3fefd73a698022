"""The library of this package's operators, `torch.ops.topkast`."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("topkast", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator and return its overload, for which PyTorch would otherwise search at each call.

    Args:
        schema: as in `torch.library.Library.define`.
        implementation: for every device, not differentiable.
        fake: returns empty results of the right shapes, for torch.compile.
    """
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"topkast::{name}", fake, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.topkast, name).default
    return overload
