"""How a weight that is mostly zero is written as two plain tensors: its values, and where they belong.

An entry counts as zero if all its bits are, so that -0.0 and every NaN come back as they were. docs/export.md
describes the encodings for other readers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_topkast.errors import TopKastError

BITMASK, GAPS, TWO_OF_FOUR = "bitmask", "gaps", "2:4"

_Array: TypeAlias = NDArray[np.generic]
_Width: TypeAlias = np.dtype[np.uint8] | np.dtype[np.uint16]
_WIDTHS: tuple[_Width, ...] = (np.dtype(np.uint8), np.dtype(np.uint16))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an entry


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight's values and their places.

    Attributes:
        encoding: "bitmask", "gaps" or "2:4".
        shape: of the weight.
        values: (k,), in the weight's dtype.
        places: uint8 or uint16; what they mean depends on the encoding.
    """

    encoding: str
    shape: tuple[int, ...]
    values: Tensor
    places: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + self.places.nbytes


def encode(weight: Tensor) -> Encoded:
    """The smallest of a bit for every entry, and one or two bytes for every non-zero one.

    Args:
        weight: any shape, floating.
    """
    bits = bits_of(weight)
    entries = np.flatnonzero(bits)
    steps = np.diff(entries, prepend=0)
    size = weight.element_size()
    costs: dict[_Width | None, int] = {None: -(-bits.size // 8) + entries.size * size}
    for kind in _WIDTHS:
        count = entries.size + int(_fillers(steps, kind).sum())
        costs[kind] = count * (size + kind.itemsize)
    best = min(costs, key=lambda kind: costs[kind])
    if best is None:
        places = np.packbits(bits != 0, bitorder="little")
        return _encoded(BITMASK, weight, bits[entries], places)
    return _encoded(GAPS, weight, *_gaps(bits, entries, steps, best))


def encode_two_of_four(weight: Tensor) -> Encoded:
    """Two values of each four neighbours in a row, and two bits for each that say which.

    Args:
        weight: (out, in), of which at most two of each four neighbours are not zero; see `groups_over_two`.
    """
    groups = bits_of(weight).reshape(-1, 4)
    # those that are not zero come first; where fewer than two are, zeros fill up
    chosen = np.sort(np.argsort(groups == 0, axis=1, kind="stable")[:, :2], axis=1)
    values = np.take_along_axis(groups, chosen, axis=1).reshape(-1)
    indices = np.zeros(-(-values.size // 4) * 4, dtype=np.uint8)
    indices[: values.size] = chosen.reshape(-1)
    by_byte = indices.reshape(-1, 4)
    places = by_byte[:, 0] | by_byte[:, 1] << 2 | by_byte[:, 2] << 4 | by_byte[:, 3] << 6
    return _encoded(TWO_OF_FOUR, weight, values, places)


def groups_over_two(weight: Tensor) -> tuple[int, int]:
    """How many groups of four neighbours in a row hold more than two entries that are not zero, and of how many.

    Args:
        weight: (out, in), `in` a multiple of four.
    """
    counts = np.count_nonzero(bits_of(weight).reshape(-1, 4), axis=1)
    return int((counts > 2).sum()), counts.size


def decode(encoded: Encoded) -> Tensor:
    """The weight.

    Raises:
        TopKastError: values and places do not belong together.
    """
    values, places = bits_of(encoded.values), encoded.places.numpy().reshape(-1)
    if encoded.encoding not in _DECODERS:
        raise TopKastError(f"the encoding {encoded.encoding!r:.60} is unknown: {', '.join(_DECODERS)}")
    size = math.prod(encoded.shape)
    entries = _DECODERS[encoded.encoding](places, size, values.size)
    ordered = entries.size == values.size and bool((np.diff(entries) > 0).all())
    if not ordered or (entries.size and entries[-1] >= size):
        raise TopKastError(f"{values.size} values at {entries.size} places do not fit the shape {encoded.shape}")
    dense = np.zeros(size, dtype=values.dtype)
    dense[entries] = values
    return torch.from_numpy(dense).view(encoded.values.dtype).reshape(encoded.shape)


def bits_of(tensor: Tensor) -> _Array:
    """The bit patterns of a tensor's entries in row-major order, as integers; not a copy where none is needed."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_BITS[tensor.element_size()]).numpy()


def _encoded(encoding: str, weight: Tensor, values: _Array, places: _Array) -> Encoded:
    stored = torch.from_numpy(values).view(weight.dtype)
    return Encoded(encoding, tuple(weight.shape), stored, torch.from_numpy(places))


def _fillers(steps: NDArray[np.int64], kind: _Width) -> NDArray[np.int64]:
    """How many zeros must be written before each entry because its step is too long for `kind`."""
    return np.maximum(steps - 1, 0) // np.iinfo(kind).max


def _gaps(bits: _Array, entries: NDArray[np.int64], steps: NDArray[np.int64], kind: _Width) -> tuple[_Array, _Array]:
    longest = np.iinfo(kind).max
    fillers = _fillers(steps, kind)
    ends = np.cumsum(fillers + 1) - 1
    count = int(ends[-1]) + 1 if ends.size else 0
    values, places = np.zeros(count, dtype=bits.dtype), np.full(count, longest, dtype=kind)
    values[ends] = bits[entries]
    places[ends] = (steps - fillers * longest).astype(kind)
    return values, places


def _from_gaps(places: _Array, size: int, count: int) -> NDArray[np.int64]:
    return np.cumsum(places, dtype=np.int64)


def _from_bitmask(places: _Array, size: int, count: int) -> NDArray[np.int64]:
    _check_length(places, -(-size // 8))
    return np.flatnonzero(np.unpackbits(places.view(np.uint8), bitorder="little"))


def _from_two_of_four(places: _Array, size: int, count: int) -> NDArray[np.int64]:
    _check_length(places, -(-count // 4))
    indices = (places.view(np.uint8)[:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3).reshape(-1)[:count]
    return np.arange(indices.size) // 2 * 4 + indices


def _check_length(places: _Array, expected: int) -> None:
    if places.nbytes != expected:
        raise TopKastError(f"the places take {places.nbytes} bytes, expected {expected}")


_DECODERS: dict[str, Callable[[_Array, int, int], NDArray[np.int64]]] = {
    BITMASK: _from_bitmask,
    GAPS: _from_gaps,
    TWO_OF_FOUR: _from_two_of_four,
}
