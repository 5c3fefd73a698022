"""Bytes that a parameter takes on a device and sends a step: `weights/` and `ops/pattern.py` in figures."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.structure import Blocks, Entries
from lightning_topkast.settings import AllReduce

Strategy = Literal["single", "ddp", "fsdp2"]

_INT32, _INT64 = 4, 8
_LARGEST_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Bytes:
    """Memory and traffic of one device.

    Attributes:
        weights: parameters, as the model holds them, and buffers.
        gradients: of the parameters.
        buckets: DDP's own copy of the gradients, from which it reduces.
        optimizer: the optimizer's state.
        masks: the updated set and a telemetry flag of masked weights.
        reserve: θ outside the active set of masked weights.
        indices: of exploring entries (masked), or of all that are held (packed, compact).
        host: θ, sets and flags of packed and compact weights in host memory, a process.
        payload: what the collectives of a step work on.
        sent: what the device sends for that, by ring algorithms.
    """

    weights: int = 0
    gradients: int = 0
    buckets: int = 0
    optimizer: int = 0
    masks: int = 0
    reserve: int = 0
    indices: int = 0
    host: int = 0
    payload: int = 0
    sent: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def device(self) -> int:
        """All that lies on the device."""
        return sum(astuple(replace(self, host=0, payload=0, sent=0)))


@dataclass(frozen=True)
class Parallel:
    """How a model is spread over devices.

    Args:
        devices: of all machines together, at least 1.
        strategy: single (one process and no wrapper), ddp, or fsdp2 (`fully_shard`).
        all_reduce: what DDP reduces of masked weights: dense gradients, or only their values on the updated set.
        buckets: whether DDP keeps gradients of its own (`gradient_as_bucket_view=False`, its default).
        accumulate: batches a step.
    """

    devices: int = 1
    strategy: Strategy = "single"
    all_reduce: AllReduce = "dense"
    buckets: bool = True
    accumulate: int = 1


@dataclass(frozen=True)
class Held:
    """One parameter and how it is kept.

    Args:
        shape: the weight's own.
        dtype: of the parameter.
        execution: masked, packed, compact or dense.
        active: |A|.
        updated: |B| while exploring, which is the size of a packed parameter.
        present: |B| at present, |A| once exploration has stopped.
        trains: whether it requires a gradient.
        units: what its sets are made of.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    execution: str
    active: int
    updated: int
    present: int
    trains: bool = True
    units: Entries = field(default_factory=Entries)

    @property
    def packs(self) -> bool:
        """Whether only B's values are on the device."""
        return self.execution in ("packed", "compact")


class OptimizerState:
    """What an optimizer keeps for a parameter, seen after one step of it on parameters of a few entries.

    Args:
        make: makes the optimizer of a list of parameters.
    """

    # Sizes of the parameters it is tried on: primes, so that a dimension of the state tells which one it follows.
    _SIZES = (5, 7, 11, 13, 17, 19, 23)

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        self._make = make
        self._seen: dict[tuple[int, torch.dtype], list[tuple[tuple[int, ...], int]]] = {}

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of the state of a parameter of this shape.

        Raises:
            TopKastError: the optimizer can't be made, or takes no step by itself.
        """
        key = len(shape), dtype
        if key not in self._seen:
            self._seen[key] = self._try(*key)
        tried, total = self._SIZES[: len(shape)], 0
        for state_shape, itemsize in self._seen[key]:
            sizes = dict(zip(tried, shape, strict=True))
            entries = prod(shape) if prod(state_shape) == prod(tried) else prod(sizes.get(n, n) for n in state_shape)
            total += entries * itemsize
        return total

    def _try(self, dimensions: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], int]]:
        try:
            with torch.device("cpu"):  # also where the model is made on another by default
                parameter = nn.Parameter(torch.ones(self._SIZES[:dimensions], dtype=dtype))
                parameter.grad = torch.ones_like(parameter)
                optimizer = self._make([parameter])
                optimizer.step()
        except Exception as error:
            raise TopKastError(
                f"the optimizer's state can't be found out: its step on a {dimensions}-D {dtype} parameter fails "
                f"({type(error).__name__}: {error})"
            ) from error
        state: Any = optimizer.state[parameter].values()
        return [(tuple(value.shape), value.element_size()) for value in state if isinstance(value, torch.Tensor)]


def bytes_of(held: Held, optimizer: OptimizerState, parallel: Parallel) -> Bytes:
    """What a parameter takes of the device that has most of it, between two refreshes, and sends a step."""
    shape = (held.updated,) if held.packs else _shard(held.shape, parallel)
    entries, itemsize = prod(shape), held.dtype.itemsize
    found = Bytes(weights=entries * itemsize)
    if held.trains:
        gradients = entries * itemsize
        found += Bytes(gradients=gradients, optimizer=optimizer.nbytes(shape, held.dtype))
        if parallel.strategy == "ddp" and parallel.buckets:
            found += Bytes(buckets=gradients)
    if held.execution == "masked":
        # of a sharded weight each device has about its share of the exploring entries
        share = entries / max(prod(held.shape), 1)
        indices = round((held.present - held.active) * share)
        if parallel.strategy == "ddp" and parallel.all_reduce != "dense":
            indices += held.present  # B's, which the communication hook keeps
        found += Bytes(masks=2 * entries, reserve=entries * itemsize, indices=_INT64 * indices)
    elif held.packs:
        found += Bytes(indices=_packing(held), host=itemsize * prod(held.shape) + _sets(held))
    return found + _traffic(held, parallel)


def _shard(shape: tuple[int, ...], parallel: Parallel) -> tuple[int, ...]:
    """The largest piece of a dense tensor; `fully_shard` cuts the first dimension, and pads the smaller ones to it."""
    if parallel.strategy != "fsdp2" or not shape:
        return shape
    return (-(-shape[0] // parallel.devices), *shape[1:])


def _packing(held: Held) -> int:
    """Bytes of a `Packing`: flat indices; blocks along the grid; or two `Pattern`s, of which A's has a transpose."""
    if held.execution == "compact":
        return held.present * (_INT32 if prod(held.shape) <= _LARGEST_INT32 else _INT64)
    if isinstance(held.units, Blocks):
        rows, columns = held.units.grid(torch.Size(held.shape))[:2]
        blocks = (held.active + held.present) // (held.units.outputs * held.units.inputs)
        return _INT32 * (4 * blocks + 4 * rows + 2 * columns + 3)
    rows, columns = held.shape[0], prod(held.shape[1:])
    return _INT32 * (2 * (rows + 1) + (columns + 1) + 3 * held.active + (held.present - held.active))


def _sets(held: Held) -> int:
    """Bytes of the sets, and of what is kept of blocks beside them: their scores, and which are in B."""
    units = prod(held.units.grid(torch.Size(held.shape)))
    if not isinstance(held.units, Blocks):
        return 2 * units
    score = torch.promote_types(held.dtype, torch.float32).itemsize
    return (2 + score) * units + _INT64 * held.present * units // prod(held.shape)


def _traffic(held: Held, parallel: Parallel) -> Bytes:
    """A ring of w devices sends (w-1)/w of what it gathers or reduces and scatters, and an all-reduce does both."""
    whole, itemsize, devices = prod(held.shape), held.dtype.itemsize, parallel.devices
    if parallel.strategy == "fsdp2":
        # parameters for the forward and again for the backward pass, then the gradients; for every batch
        rounds = (3 if held.trains else 2) * parallel.accumulate
        payload = rounds * whole * itemsize
        return Bytes(payload=payload, sent=payload * (devices - 1) // devices)
    if parallel.strategy == "single" or not held.trains:
        return Bytes()
    if parallel.all_reduce in ("sparse_bf16", "sparse_fp16"):
        itemsize = 2
    on_updated_only = held.packs or (held.execution == "masked" and parallel.all_reduce != "dense")
    payload = (held.updated if on_updated_only else whole) * itemsize
    return Bytes(payload=payload, sent=2 * payload * (devices - 1) // devices)
