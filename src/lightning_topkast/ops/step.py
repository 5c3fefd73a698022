"""Compiled passes over a large masked weight on CPU: after the optimizer's step, and in place of it."""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_topkast.ops.flat import is_like
from lightning_topkast.ops.passes import passes_over, written


class Entries(NamedTuple):
    """A masked weight to pass over.

    Args:
        values: the parameter's; 0 outside A between steps.
        members: int8, like the values: all bits set in B, else 0.
        exploring: flat indices of the exploring entries, sorted.
        explored: θ there.
        factors: of the penalty: what it multiplies `explored` by, and the values of A.
    """

    values: Tensor
    members: Tensor
    exploring: Tensor
    explored: Tensor
    factors: tuple[float, float]


class Update(NamedTuple):
    """What a step of an optimizer does to a parameter; see `flat.cpp`.

    Args:
        pass_name: "sgd" or "adam".
        options: its numbers.
        state: the optimizer's tensors with a value for each entry.
        steps: the optimizer's float32 tensor with the number of steps, or None.
        uses_mkl: whether PyTorch takes the square roots by MKL, if it has that, whose rounding differs.
    """

    pass_name: str
    options: tuple[float, ...]
    state: tuple[Tensor, ...]
    steps: Tensor | None = None
    uses_mkl: bool = False


def close_(entries: Entries, is_open: bytearray) -> bool:
    """Take exploring entries out in one pass and apply the penalty, if that is compiled; return whether it was done.

    `explored` becomes the values at its places times the first factor, and the values become 0 there and outside
    `members`; elsewhere they are multiplied by the second factor. `is_open` (one byte) becomes 0 within the same call,
    so that nothing can happen in between.
    """
    passes = passes_over(*entries[:4])
    if passes is None or not _fit(entries, entries.values):
        return False
    flag = ctypes.addressof(ctypes.c_byte.from_buffer(is_open))
    passes("close", *_arguments(entries), flag, torch.get_num_threads())
    written(entries.values)
    written(entries.explored)
    return True


def is_compiled_for(values: Tensor) -> bool:
    """Return whether there are compiled passes for these values of a weight."""
    return passes_over(values) is not None


def step_(entries: Entries, gradient: Tensor, masks: bool, update: Update) -> bool:
    """Take a whole step in one pass, if that is compiled: mask, put θ in, update, and `close_`; return if it was done.

    Args:
        entries: of which values, `explored` and the optimizer's state change.
        gradient: of the values.
        masks: whether the gradient is not yet zero outside `members`, and becomes so.
        update: the optimizer's.
    """
    passes = passes_over(*entries[:4], gradient, *update.state)
    if passes is None or not _fit(entries, entries.values, gradient, *update.state):
        return False
    options = torch.tensor(update.options, dtype=torch.float64, device="cpu")
    state: tuple[Tensor | int, ...] = update.state or (0,)  # a null pointer for a momentum that there is not
    if update.pass_name == "adam":  # the step is counted within the same call, so that nothing can happen in between
        state = *state, 0 if update.steps is None else update.steps, _mkl_root() if update.uses_mkl else 0
    passes(update.pass_name, *_arguments(entries), gradient, masks, options, *state, torch.get_num_threads())
    for tensor in (entries.values, entries.explored, gradient, *update.state, update.steps):
        if tensor is not None:
            written(tensor)
    return True


def _fit(entries: Entries, *tensors: Tensor) -> bool:
    """Return whether all are float32, and these tensors in the memory order of the weight."""
    types = {each.dtype for each in (entries.explored, *tensors)}
    return types == {torch.float32} and all(is_like(each, entries.members) for each in tensors)


def _arguments(entries: Entries) -> tuple[Tensor | int, ...]:
    values, members, exploring, explored, factors = entries
    both = torch.tensor(factors, dtype=torch.float64, device="cpu")
    return values, members, values.numel(), exploring, explored, exploring.numel(), both


@cache
def _mkl_root() -> int:
    """Return the address of MKL's square root in PyTorch's library, or 0 if it has none."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.vmsSqrt, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
