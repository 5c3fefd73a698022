"""The compiled functions of `flat.cpp`, each a pass over the entries of a large weight on CPU."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_topkast.ops.compiled import Compiled

COMPILED = Compiled(Path(__file__).with_name("flat.cpp"), "large weights")
# Number of entries from which the compiled functions are used; a run without such a weight never compiles them.
MANY = 1 << 16


def passes_over(*tensors: Tensor) -> "Passes | None":
    """Return the compiled functions, if these tensors are plain ones on CPU and one of them is large.

    Not while `torch.jit.trace` records: it would not see what they compute, and takes sizes for tensors.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None
    largest = 0
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            return None
        largest = max(largest, tensor.numel())
    functions = COMPILED.functions() if largest >= MANY else None
    return None if functions is None else Passes(functions)


class Passes:
    """The compiled functions, which take integers and tensors on CPU, whatever PyTorch's default device."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    def __call__(self, name: str, *arguments: Any) -> int:
        function = getattr(self._functions, f"topkast_{name}")
        function.restype = ctypes.c_int64
        return function(
            *(
                ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.c_int64(each)
                for each in arguments
            )
        )


def written(tensor: Tensor) -> None:
    """Tell autograd that a compiled function has written to a tensor, as PyTorch's own operators do."""
    torch.autograd.graph.increment_version(tensor)
