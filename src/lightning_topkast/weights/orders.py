"""The sets that the optimizer's state of a weight belongs to."""

import hashlib
from typing import Any

from torch import Tensor

from lightning_topkast.weights.layouts import Layout

Sets = Tensor | Layout
_KEPT = 4  # orders between two steps whose sets are known; state of others begins anew


class Orders:
    """Which sets state of the optimizer belongs to, although they are replaced without it when weights are loaded.

    As long as only refreshes change the sets, which move the state with them, the order is the same. All sets are given
    by the units' tiers, or by the layout of packed values, whose order the state has.
    """

    def __init__(self) -> None:
        self.present = 0
        self._count = 0
        self._earlier: dict[int, Sets] = {}  # sets of earlier orders since the last step
        self._loaded: Sets | None = None

    def replace(self, sets: Sets) -> None:
        """Begin another order, since sets are replaced without the optimizer's state.

        Args:
            sets: those until now.
        """
        self._earlier.setdefault(self.present, sets)
        if len(self._earlier) > _KEPT:
            del self._earlier[list(self._earlier)[1]]  # the first is that of the last step
        self._count += 1
        self.present = self._count

    def load(self, sets: Sets) -> None:
        """Note sets that were loaded with a saved state; the optimizer may load its state of the same moment later."""
        self._loaded = sets

    def refresh(self, unmoved: Sets | None = None) -> None:
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

    def sets_of(self, order: int | None, sets: Sets) -> Sets | None:
        """Return the sets that state of the optimizer belongs to, or None if they are not known.

        Args:
            order: in which the state was used last. None: it was loaded, or made without us, and belongs to the sets
                that were loaded last, or else to the present ones.
            sets: the present ones.
        """
        if order is None and self._loaded is not None:
            return self._loaded
        if order is None or order == self.present:
            return sets
        return self._earlier.get(order)

    def sets_with(self, saved: Any, sets: Sets) -> Sets | None:
        """Return the sets with a fingerprint, or None if they are not known.

        Args:
            saved: what stood in a state that may come from a file.
            sets: the present ones.
        """
        known = [sets, self._loaded, *self._earlier.values()] if isinstance(saved, int) else []
        return next((each for each in known if each is not None and fingerprint(each) == saved), None)


def fingerprint(sets: Sets) -> int:
    """Return a number that differs for other sets."""
    digest = hashlib.blake2b(digest_size=7)
    for tiers in [sets] if isinstance(sets, Tensor) else sets.tiers():
        digest.update(tiers.cpu().contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little")
