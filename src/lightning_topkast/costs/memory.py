"""Bytes that a parameter takes on a device and sends per step; the formulas follow `weights/` and `ops/`."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_topkast.errors import TopKastError
from lightning_topkast.gradients import AllReduce, TopKGradients
from lightning_topkast.method.structure import Block, Structure, Unstructured
from lightning_topkast.ops import EntryPattern
from lightning_topkast.weights.layouts import Product, as_kernel

Strategy = Literal["single", "ddp", "fsdp2"]

_INT32, _INT64 = 4, 8
_LARGEST_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Bytes:
    """Memory and traffic of one device.

    Attributes:
        weights: parameters and buffers of the model.
        gradients: of the parameters.
        buckets: DDP's own copy of the gradients, which it reduces, and what a rank has not sent yet of them.
        optimizer: the optimizer's state.
        masks: the updated set and a telemetry flag of masked weights.
        latent: latent values, θ outside the active set, of masked weights.
        indices: of exploring entries, and their values (masked), or of all stored entries (packed, compact).
        host: θ, sets and flags of packed and compact weights in host memory, per process.
        payload: data of the collectives per step.
        sent: data that the device sends for these collectives, with ring algorithms.
        refresh: data that a process sends at a refresh, from host memory.
    """

    weights: int = 0
    gradients: int = 0
    buckets: int = 0
    optimizer: int = 0
    masks: int = 0
    latent: int = 0
    indices: int = 0
    host: int = 0
    payload: int = 0
    sent: int = 0
    refresh: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def device(self) -> int:
        """Memory on the device in total."""
        return sum(astuple(replace(self, host=0, payload=0, sent=0, refresh=0)))


@dataclass(frozen=True)
class Parallel:
    """The distribution of a model over devices.

    Args:
        devices: number of devices of all machines, at least 1.
        strategy: single (one process and no wrapper), ddp, or fsdp2 (`fully_shard`).
        all_reduce: gradients of sparse weights that DDP reduces: dense, only on the updated set, or the largest there.
        buckets: whether DDP keeps its own copy of gradients (`gradient_as_bucket_view=False`, its default).
        accumulate: number of batches per step.
    """

    devices: int = 1
    strategy: Strategy = "single"
    all_reduce: AllReduce = "dense"
    buckets: bool = True
    accumulate: int = 1


@dataclass(frozen=True)
class Held:
    """One parameter and its storage.

    Args:
        shape: the weight's own shape.
        dtype: of the parameter.
        storage: masked, packed, compact or dense.
        active: |A|.
        updated: |B| while exploring, which is the size of a packed parameter.
        present: |B| at present, which is |A| after exploration has stopped.
        trains: whether it requires a gradient.
        structure: what its sets consist of.
        product: how the layer multiplies by a packed weight.
        shares: whether processes share θ of a packed weight in their host memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: str
    active: int
    updated: int
    present: int
    trains: bool = True
    structure: Structure = field(default_factory=Unstructured)
    product: Product | None = None
    shares: bool = False

    @property
    def packs(self) -> bool:
        """Whether only the values of B are on the device."""
        return self.storage in ("packed", "compact")


class OptimizerState:
    """The size of an optimizer's state for a parameter, measured by one step on a small parameter.

    Args:
        make: makes the optimizer for a list of parameters.
    """

    # Sizes of the small parameters: primes, so that each dimension of the state can be matched to one of the parameter.
    _SIZES = (5, 7, 11, 13, 17, 19, 23)

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        self._make = make
        self._seen: dict[tuple[int, torch.dtype], list[tuple[tuple[int, ...], int]]] = {}

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the size in bytes of the state of a parameter of this shape.

        Raises:
            TopKastError: the optimizer cannot be created, or its step fails.
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
            with torch.device("cpu"):  # even if another device is the default
                parameter = nn.Parameter(torch.ones(self._SIZES[:dimensions], dtype=dtype))
                parameter.grad = torch.ones_like(parameter)
                optimizer = self._make([parameter])
                optimizer.step()
        except Exception as error:
            raise TopKastError(
                f"the size of the optimizer's state is not known, since its step on a {dimensions}-D {dtype} parameter "
                f"fails ({type(error).__name__}: {error})"
            ) from error
        state: Any = optimizer.state[parameter].values()
        return [(tuple(value.shape), value.element_size()) for value in state if isinstance(value, torch.Tensor)]


def bytes_of(held: Held, optimizer: OptimizerState, parallel: Parallel) -> Bytes:
    """Return the bytes of a parameter on the device with the largest part, between two refreshes, and its traffic."""
    shape = _shard((held.updated,) if held.packs else held.shape, parallel)
    entries, itemsize = prod(shape), held.dtype.itemsize
    found = Bytes(weights=entries * itemsize)
    if held.trains:
        gradients = entries * itemsize
        found += Bytes(gradients=gradients, optimizer=optimizer.nbytes(shape, held.dtype))
        if parallel.strategy == "ddp" and parallel.buckets:
            found += Bytes(buckets=gradients)
        if _sends_largest(held, parallel):
            unit = prod(held.shape) // max(prod(held.structure.grid(torch.Size(held.shape))), 1) if held.packs else 1
            found += Bytes(buckets=held.present * itemsize, host=_INT64 * held.present // unit)
    if held.storage == "masked":
        # each device has about its share of the exploring entries of a sharded weight
        share = entries / max(prod(held.shape), 1)
        indices = (_INT64 + itemsize) * round((held.present - held.active) * share)
        if parallel.strategy == "ddp" and parallel.all_reduce != "dense":
            indices += _INT64 * held.present  # those of B, which the communication hook keeps
        found += Bytes(masks=2 * entries, latent=entries * itemsize, indices=indices)
    elif held.packs:
        found += Bytes(indices=_packing(held), host=_at_home(held, parallel))
        if held.shares:
            state = optimizer.nbytes((held.updated,), held.dtype) if held.trains else 0
            found += Bytes(refresh=_refresh(held, parallel, held.dtype.itemsize + state / max(held.updated, 1)))
    return found + _traffic(held, parallel)


def _shard(shape: tuple[int, ...], parallel: Parallel) -> tuple[int, ...]:
    """Return the largest shard of a dense tensor; `fully_shard` shards the first dimension and pads smaller shards."""
    if parallel.strategy != "fsdp2" or not shape:
        return shape
    return (-(-shape[0] // parallel.devices), *shape[1:])


def _packing(held: Held) -> int:
    """Return bytes of a `Layout`: flat indices, blocks of the grid, or the patterns of a matrix or a convolution."""
    if held.storage == "compact":
        return held.present * (_INT32 if prod(held.shape) <= _LARGEST_INT32 else _INT64)
    if isinstance(held.structure, Block):
        rows, columns = held.structure.grid(torch.Size(held.shape))[:2]
        blocks = (held.active + held.present) // (held.structure.outputs * held.structure.inputs)
        return _INT32 * (4 * blocks + 4 * rows + 2 * columns + 3)
    how, rows, columns = held.product or Product(), held.shape[0], prod(held.shape[1:])
    if how.groups is not None:
        return EntryPattern.bytes_of(as_kernel(torch.Size(held.shape)), how.groups, False, held.active, held.present)
    if how.kernels == "compiled":
        return EntryPattern.bytes_of((rows, columns, 1, 1), 1, how.transposed, held.active, held.present)
    return _INT32 * (2 * (rows + 1) + (columns + 1) + 3 * held.active + (held.present - held.active))


def _at_home(held: Held, parallel: Parallel) -> int:
    """Return bytes of θ, the sets, and for blocks their scores and places of B in a process' host memory."""
    grid, score = held.structure.grid(torch.Size(held.shape)), torch.float64.itemsize
    units, size = prod(grid), prod(held.shape) // max(prod(grid), 1)
    shared = -(-grid[0] // parallel.devices) * prod(grid[1:]) if held.shares else units
    is_block = isinstance(held.structure, Block)
    places = _INT64 * held.present // size if size > 1 else 0
    return shared * (held.dtype.itemsize * size + 2 + (score if is_block else 0)) + places


def _refresh(held: Held, parallel: Parallel, moved: float) -> int:
    """Return what the process that sends most sends at a refresh of a packed weight whose θ is shared.

    Args:
        held: the weight.
        parallel: the distribution over devices.
        moved: bytes of a value and of its optimizer state.
    """
    devices, grid = parallel.devices, held.structure.grid(torch.Size(held.shape))
    units, size = prod(grid), prod(held.shape) // max(prod(grid), 1)
    place, rows = _INT32 if units <= _LARGEST_INT32 else _INT64, -(-grid[0] // devices) / grid[0]
    length = _shard((held.updated,), parallel)[0]
    before = np.arange(devices + 1)  # number of devices before each, and of all
    begins = np.minimum(before * rows, 1)  # of the shares of rows at home with each
    at_home = np.diff(begins) * held.present
    sent = place / size * at_home * (devices - 1)
    if parallel.strategy == "fsdp2":  # its slice of the values goes home, and what is at home here goes to slices
        slices = np.minimum(before * length, held.present)
        stays = np.zeros(devices)
        for start, stop in ((0, held.active), (held.active, held.present)):  # of each it has the same share at home
            homes = start + begins * (stop - start)
            stays += np.maximum(np.minimum(slices[1:], homes[1:]) - np.maximum(slices[:-1], homes[:-1]), 0)
        sent += moved * (np.diff(slices) + at_home - 2 * stays)
    else:
        sent += moved * at_home * (devices - 1)
    scores = 2 * torch.float64.itemsize * units * (devices - 1) / devices if isinstance(held.structure, Block) else 0
    return round(float(sent.max()) + scores)


def _sends_largest(held: Held, parallel: Parallel) -> bool:
    """Return whether DDP sends only the largest values of this parameter's gradient."""
    by_size = parallel.strategy == "ddp" and isinstance(parallel.all_reduce, TopKGradients)
    return by_size and held.trains and held.storage != "dense"


def _traffic(held: Held, parallel: Parallel) -> Bytes:
    """Return the traffic: a ring of w devices sends (w-1)/w of the data per gather or scatter, 2× per all-reduce."""
    whole, itemsize, devices = prod(held.shape), held.dtype.itemsize, parallel.devices
    if parallel.strategy == "fsdp2":
        # parameters for the forward and again for the backward pass, then gradients; for each batch
        rounds = (3 if held.trains else 2) * parallel.accumulate
        payload = rounds * (held.updated if held.packs else whole) * itemsize
        return Bytes(payload=payload, sent=payload * (devices - 1) // devices)
    if parallel.strategy == "single" or not held.trains:
        return Bytes()
    if parallel.all_reduce in ("sparse_bf16", "sparse_fp16"):
        itemsize = 2
    if _sends_largest(held, parallel):
        assert isinstance(parallel.all_reduce, TopKGradients)
        count = max(1, round(parallel.all_reduce.density * held.present))
        place = _INT32 if held.present <= _LARGEST_INT32 else _INT64
        message = count * (itemsize + place) + place  # the last one says whether the rank has used the weight
        return Bytes(payload=message * devices, sent=message * (devices - 1))
    on_updated_only = held.packs or (held.storage == "masked" and parallel.all_reduce != "dense")
    payload = (held.updated if on_updated_only else whole) * itemsize
    return Bytes(payload=payload, sent=2 * payload * (devices - 1) // devices)
