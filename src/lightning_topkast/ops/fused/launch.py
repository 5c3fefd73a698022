"""Launch of the kernels over many tensors. Importing this module imports triton, which is optional."""

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_topkast.ops.blocks.launch import INTERPRETED, on
from lightning_topkast.ops.fused.kernels import mask_kernel, open_kernel, take_kernel
from lightning_topkast.ops.step import Entries

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_CHUNK = 64 if INTERPRETED else 2048  # elements that a program passes over; small tests should have several programs

Row = Sequence[int]


def open_(masked: Sequence[tuple[Tensor, Tensor]], opened: Sequence[Entries]) -> None:
    """Same as `step.open_`, for tensors of one type on one device, of which there is one at least."""
    first = masked[0][0] if masked else opened[0].values
    masks = [
        [gradient.numel() for gradient, _ in masked],
        _addresses(gradient for gradient, _ in masked),
        _addresses(members for _, members in masked),
    ]
    puts = [
        [each.exploring.numel() for each in opened],
        _addresses(each.values for each in opened),
        _addresses(each.exploring for each in opened),
        _addresses(each.explored for each in opened),
    ]
    masking = _programs(masks[0])
    with on(first):
        _start(
            open_kernel,
            masking + _programs(puts[0]),
            *(_table(masks, first), len(masked), masking, _table(puts, first), len(opened)),
            WIDTH=_width(max(len(masked), len(opened))),
            TYPE=TYPES[first.dtype],
            ALIGNED=_aligned(masks[1] + masks[2]),
        )


def close_(closed: Sequence[Entries]) -> None:
    """Same as `step.close_`, likewise."""
    first = closed[0].values
    takes = [
        [each.exploring.numel() for each in closed],
        _addresses(each.values for each in closed),
        _addresses(each.exploring for each in closed),
        _addresses(each.explored for each in closed),
        [_bits(each.factors[0]) for each in closed],
    ]
    masks = [
        [each.values.numel() for each in closed],
        takes[1],
        _addresses(each.members for each in closed),
        [_bits(each.factors[1]) for each in closed],
    ]
    shared: dict[str, Any] = {"WIDTH": _width(len(closed)), "TYPE": TYPES[first.dtype]}
    with on(first):  # two launches, since what is taken must be zero before all others are multiplied
        _start(take_kernel, _programs(takes[0]), _table(takes, first), len(closed), **shared)
        aligned = _aligned(masks[1] + masks[2])
        _start(mask_kernel, _programs(masks[0]), _table(masks, first), len(closed), ALIGNED=aligned, **shared)


def _start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, CHUNK=_CHUNK, **constants)


def _programs(sizes: Row) -> int:
    return sum(-(-size // _CHUNK) for size in sizes)


def _width(tensors: int) -> int:
    return 1 << max(tensors - 1, 0).bit_length()


def _addresses(tensors: Any) -> list[int]:
    return [each.data_ptr() for each in tensors]


def _aligned(addresses: Row) -> bool:
    return all(address % 16 == 0 for address in addresses)


def _bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def _table(rows: Sequence[Row], like: Tensor) -> Tensor:
    numbers = tuple(chain.from_iterable(rows))
    if not like.is_cuda:
        return _kept(numbers, like.device)
    # a graph needs a table of its own, which it writes at each replay
    write = _written if torch.cuda.is_current_stream_capturing() else _kept
    return write(numbers, like.device, torch.cuda.current_stream().cuda_stream)


def _written(numbers: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    """Write integers on a device, without waiting for it, as arguments of kernels: a graph can hold these."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    if numbers:
        torch._foreach_add_(list(table.unbind()), list(numbers))
    return table


_kept = lru_cache(maxsize=32)(_written)
