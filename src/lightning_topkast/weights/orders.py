"""The sets that the optimizer's state of a weight belongs to."""

import hashlib
from typing import Any

from torch import Tensor

_KEPT = 4  # orders between two steps whose sets are known; state of others begins anew


class Orders:
    """Which sets state of the optimizer belongs to, although they are replaced without it when weights are loaded.

    As long as only refreshes change the sets, which move the state with them, the order is the same. All sets are given
    by the units' tiers, which determine the order of packed state.
    """

    def __init__(self) -> None:
        self.present = 0
        self._count = 0
        self._earlier: dict[int, Tensor] = {}  # sets of earlier orders since the last step
        self._loaded: Tensor | None = None

    def replace(self, units: Tensor) -> None:
        """Begin another order, since sets are replaced without the optimizer's state.

        Args:
            units: the sets until now.
        """
        self._earlier.setdefault(self.present, units)
        if len(self._earlier) > _KEPT:
            del self._earlier[list(self._earlier)[1]]  # the first is that of the last step
        self._count += 1
        self.present = self._count

    def load(self, units: Tensor) -> None:
        """Note sets that were loaded with a saved state; the optimizer may load its state of the same moment later."""
        self._loaded = units

    def refresh(self, unmoved: Tensor | None = None) -> None:
        """Note a refresh, which has moved all state of the sets before it.

        Args:
            unmoved: the sets before it, if there may be packed state of these that it was not given.
        """
        if unmoved is not None:
            self.replace(unmoved)
        else:
            self._earlier.pop(self.present, None)

    def step(self) -> None:
        """Note that a step was taken, before which all state was moved to the present sets."""
        self._earlier.clear()
        self._loaded = None

    def sets_of(self, order: int | None, units: Tensor) -> Tensor | None:
        """Return the sets that state of the optimizer belongs to, or None if they are not known.

        Args:
            order: in which the state was used last. None: it was loaded, or made without us, and belongs to the sets
                that were loaded last, or else to the present ones.
            units: the present sets.
        """
        if order is None and self._loaded is not None:
            return self._loaded
        if order is None or order == self.present:
            return units
        return self._earlier.get(order)

    def sets_with(self, saved: Any, units: Tensor) -> Tensor | None:
        """Return the sets with a fingerprint, or None if they are not known.

        Args:
            saved: what stood in a state that may come from a file.
            units: the present sets.
        """
        known = [units, self._loaded, *self._earlier.values()] if isinstance(saved, int) else []
        return next((each for each in known if each is not None and fingerprint(each) == saved), None)


def fingerprint(units: Tensor) -> int:
    """Return a number that differs for other sets."""
    digest = hashlib.blake2b(units.cpu().contiguous().numpy().data, digest_size=7)
    return int.from_bytes(digest.digest(), "little")
