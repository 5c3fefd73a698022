"""Noticing that other code has written to a parameter."""

import numpy as np
import torch
from torch import Tensor, nn

from lightning_topkast.distributed import to_local
from lightning_topkast.method.selection import ACTIVE
from lightning_topkast.ops.flat import flat, has_bits

# Places outside A that are looked at before every step.
_PLACES = 256


class WriteWatch:
    """Whether other code has written to a parameter since we last did, known by its version counter and its address.

    Writes through `parameter.data` change neither, nor do some to the local part of a DTensor. After `look_at`, they
    are noticed too on a CPU, unless they miss all of a few hundred places that we keep at zero. A look takes
    microseconds.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, int, int] | None = None
        self._places: np.ndarray = np.empty(0, dtype=np.int64)

    def look_at(self, tiers: Tensor) -> None:
        """Choose the places to look at: outside A.

        Args:
            tiers: in the shape and memory order of the parameter, or of its local part.
        """
        self._places = np.empty(0, dtype=np.int64)
        if tiers.device.type == "cpu":  # elsewhere reading values takes long
            places = torch.arange(0, tiers.numel(), tiers.numel() // _PLACES | 1, device=tiers.device)
            self._places = places[flat(tiers).index_select(0, places) != ACTIVE].numpy()

    def note(self, parameter: nn.Parameter) -> None:
        """Remember that the parameter is what we wrote."""
        self._seen = stamp(parameter)

    def differs(self, parameter: nn.Parameter) -> bool:
        """Return whether other code has written to the parameter since `note`."""
        if self._seen != stamp(parameter):
            return True
        return self._places.size > 0 and has_bits(to_local(parameter.detach()), self._places)


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """Return what changes when anybody writes to a tensor in place, or gives it other memory."""
    with torch.no_grad():  # or a DTensor would give a view; `detach()` of one has a counter of its own
        local = to_local(tensor)
    return tensor._version, local._version, local.data_ptr()
