"""Encodings of a mostly zero weight as two plain tensors: its values and their places.

An entry counts as zero if all its bits are 0, so that -0.0 and every NaN are preserved. docs/export.md describes the
encodings for other readers.
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
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight's values and their places.

    Attributes:
        encoding: "bitmask", "gaps" or "2:4".
        shape: of the weight.
        values: (k,), in the weight's dtype.
        places: uint8 or uint16; their meaning depends on the encoding.
    """

    encoding: str
    shape: tuple[int, ...]
    values: Tensor
    places: Tensor

    @property
    def nbytes(self) -> int:
        """Size of both tensors in bytes."""
        return self.values.nbytes + self.places.nbytes


def encode(weight: Tensor) -> Encoded:
    """Encode a weight with one bit per entry or with one or two bytes per non-zero entry, whichever is smallest.

    Args:
        weight: any shape, floating point.
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
    """Encode two values of every four consecutive entries in a row, each with two bits for its position.

    Args:
        weight: (out, in), with at most two non-zero entries of every four consecutive ones; see `groups_over_two`.
    """
    groups = bits_of(weight).reshape(-1, 4)
    # non-zero entries come first; zeros fill groups with fewer than two
    chosen = np.sort(np.argsort(groups == 0, axis=1, kind="stable")[:, :2], axis=1)
    values = np.take_along_axis(groups, chosen, axis=1).reshape(-1)
    indices = np.zeros(-(-values.size // 4) * 4, dtype=np.uint8)
    indices[: values.size] = chosen.reshape(-1)
    by_byte = indices.reshape(-1, 4)
    places = by_byte[:, 0] | by_byte[:, 1] << 2 | by_byte[:, 2] << 4 | by_byte[:, 3] << 6
    return _encoded(TWO_OF_FOUR, weight, values, places)


def groups_over_two(weight: Tensor) -> tuple[int, int]:
    """Return the number of groups of four consecutive entries with more than two non-zero ones, and of all groups.

    Args:
        weight: (out, in), `in` a multiple of four.
    """
    counts = np.count_nonzero(bits_of(weight).reshape(-1, 4), axis=1)
    return int((counts > 2).sum()), counts.size


def decode(encoded: Encoded) -> Tensor:
    """Return the dense weight.

    Raises:
        TopKastError: values and places do not fit together.
    """
    values, places = bits_of(encoded.values), encoded.places.numpy().reshape(-1)
    if encoded.encoding not in _DECODERS:
        raise TopKastError(f"expected an encoding of {', '.join(_DECODERS)}, got {encoded.encoding!r:.60}")
    size = math.prod(encoded.shape)
    entries = _DECODERS[encoded.encoding](places, size, values.size)
    ordered = entries.size == values.size and bool((np.diff(entries) > 0).all())
    if not ordered or (entries.size and entries[-1] >= size):
        raise TopKastError(f"{values.size} values at {entries.size} places do not fit the shape {encoded.shape}")
    dense = np.zeros(size, dtype=values.dtype)
    dense[entries] = values
    return torch.from_numpy(dense).view(encoded.values.dtype).reshape(encoded.shape)


def bits_of(tensor: Tensor) -> _Array:
    """Return the bit patterns of a tensor's entries in row-major order, as integers; without a copy if possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_BITS[tensor.element_size()]).numpy()


def _encoded(encoding: str, weight: Tensor, values: _Array, places: _Array) -> Encoded:
    stored = torch.from_numpy(values).view(weight.dtype)
    return Encoded(encoding, tuple(weight.shape), stored, torch.from_numpy(places))


def _fillers(steps: NDArray[np.int64], kind: _Width) -> NDArray[np.int64]:
    """Return the number of zeros to write before each entry because its step is too long for `kind`."""
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
        raise TopKastError(f"expected places of {expected} bytes, got {places.nbytes}")


_DECODERS: dict[str, Callable[[_Array, int, int], NDArray[np.int64]]] = {
    BITMASK: _from_bitmask,
    GAPS: _from_gaps,
    TWO_OF_FOUR: _from_two_of_four,
}
