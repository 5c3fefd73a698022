"""Noticing that other code has written to a parameter."""

import numpy as np
import torch
from torch import Tensor

from lightning_topkast.method.selection import ACTIVE
from lightning_topkast.ops.flat import flat, has_bits

# Places outside A that are looked at before every step.
_PLACES = 256


class WriteWatch:
    """Whether other code has written to a tensor since we last did, known by its version counter and its address.

    Writes through `parameter.data` change neither. After `look_at`, they are noticed too on a CPU, unless they miss all
    of a few hundred places that we keep at zero. A look takes microseconds.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._places: np.ndarray = np.empty(0, dtype=np.int64)

    def look_at(self, tiers: Tensor) -> None:
        """Choose the places to look at: outside A.

        Args:
            tiers: in the tensor's shape and memory order.
        """
        self._places = np.empty(0, dtype=np.int64)
        if tiers.device.type == "cpu":  # elsewhere reading values takes long
            places = torch.arange(0, tiers.numel(), tiers.numel() // _PLACES | 1)
            self._places = places[flat(tiers).index_select(0, places) != ACTIVE].numpy()

    def note(self, values: Tensor) -> None:
        """Remember that the tensor is what we wrote."""
        self._seen = _stamp(values)

    def differs(self, values: Tensor) -> bool:
        """Return whether other code has written to the tensor since `note`."""
        return self._seen != _stamp(values) or (self._places.size > 0 and has_bits(values, self._places))


def _stamp(values: Tensor) -> tuple[int, int]:
    return values._version, values.data_ptr()
