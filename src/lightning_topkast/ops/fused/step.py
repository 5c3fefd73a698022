"""What is done around the optimizer's step, for many masked weights at once."""

import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_topkast.ops.blocks.choice import triton_version
from lightning_topkast.ops.flat import fill_, flat, is_like, mask_outside_, put_, take
from lightning_topkast.ops.passes import written
from lightning_topkast.ops.step import Entries

_TRIALS = ((5000, 640), (5000, 1, 333))  # numbers of entries: all begin at aligned addresses, and not

_log = logging.getLogger(__name__)


class Masked(NamedTuple):
    """A tensor to mask.

    Args:
        values: become 0 where they are no members.
        members: int8, like the values: all bits set, else 0.
    """

    values: Tensor
    members: Tensor


_Item = TypeVar("_Item", Masked, Entries)


def fits(values: Tensor, members: Tensor) -> bool:
    """Return whether the kernels, if they work, can pass over values of a weight, or its gradient, and its members."""
    return works(values.device, values.dtype) and is_like(values, members) and values.device == members.device


def open_(masked: Iterable[Masked], opened: Iterable[Entries]) -> None:
    """Mask gradients, and put θ of the exploring entries into the values of weights."""
    masked, opened = list(masked), list(opened)
    gradients, weights = _by_kind(masked), _by_kind(opened)
    for kind in dict.fromkeys([*gradients, *weights]):
        _launch().open_(gradients[kind], weights[kind])
    for values in [each.values for each in masked] + [each.values for each in opened]:
        written(values)


def close_(closed: Iterable[Entries]) -> None:
    """Take exploring entries out of weights and apply the penalty; see `lightning_topkast.ops.step.close_`."""
    closed = list(closed)
    for weights in _by_kind(closed).values():
        _launch().close_(weights)
    for each in closed:
        written(each.values)
        written(each.explored)


def _launch() -> Any:
    return import_module("lightning_topkast.ops.fused.launch")  # which imports triton


def _by_kind(items: Sequence[_Item]) -> dict[Hashable, list[_Item]]:
    kinds: dict[Hashable, list[_Item]] = defaultdict(list)
    for each in items:
        kinds[each.values.device, each.values.dtype].append(each)
    return kinds


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels change values to the same bits as PyTorch's operators; the first call tries it."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (device.type == "cuda" or interpreted) or not triton_version():
        return False
    try:
        if dtype not in _launch().TYPES:
            return False
        same = all(_give_the_same(sizes, device, dtype) for sizes in _TRIALS)
        obstacle = "" if same else "they give other results"
    except Exception as error:  # such as that of a missing compiler
        obstacle = f"{type(error).__name__}: {error}"
    if obstacle:
        _log.warning("launching kernels for each masked weight apart, since fused ones do not work here: %s", obstacle)
    return not obstacle


def _give_the_same(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> bool:
    fused, apart = (_examples(sizes, device, dtype) for _ in range(2))
    open_([Masked(gradient, each.members) for each, gradient in fused], [each for each, _ in fused])
    close_([each for each, _ in fused])
    for each, gradient in apart:
        mask_outside_(gradient, each.members)
        put_(each.values, each.exploring, each.explored)
        take(each.values, each.exploring, out=each.explored)
        fill_(each.values, each.exploring, 0)
        mask_outside_(each.values, each.members)
        for values, factor in zip((each.explored, each.values), each.factors, strict=True):
            values.mul_(factor)
    return all(
        torch.equal(flat(own).view(torch.uint8), flat(other).view(torch.uint8))
        for (one, gradient), (two, expected) in zip(fused, apart, strict=True)
        for own, other in ((gradient, expected), (one.values, two.values), (one.explored, two.explored))
    )


def _examples(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[tuple[Entries, Tensor]]:
    generator = torch.Generator("cpu").manual_seed(0)
    examples = []
    for size in sizes:
        values, gradient, explored = torch.randn(3, size, generator=generator, device="cpu").to(device, dtype)
        gradient[::3] = float("nan")
        tiers = torch.randint(3, (size,), generator=generator, device="cpu").to(device)
        exploring = (tiers == 1).nonzero().flatten()
        members = -(tiers != 0).to(torch.int8)
        examples.append(
            (Entries(values, members, exploring, explored[: exploring.numel()].clone(), (0.999, 0.9999)), gradient)
        )
    return examples
