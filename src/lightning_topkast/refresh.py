"""Choosing the next sets of weights, now or in the background."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.errors import NonFiniteWeightError, TopKastError
from lightning_topkast.selection import ACTIVE, EXPLORING, NonFiniteScoresError, nested_top_k, top_k_then_random
from lightning_topkast.settings import Settings
from lightning_topkast.weights import SparseWeight

# One thread for all: selection is bound by memory, and the training goes on beside it.
_background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="topkast-refresh")


def choose(weight: SparseWeight, settings: Settings, step: int, explores: bool, scores: Tensor | None = None) -> Tensor:
    """The next sets of one weight, as tiers.

    Args:
        weight: whose sets are chosen.
        settings: of the run.
        step: optimizer steps done; with the seed it decides random exploration.
        explores: whether B is to be larger than A.
        scores: |θ|; None for the present one.

    Raises:
        NonFiniteWeightError: the weight holds NaN or infinity.
    """
    scores = weight.magnitudes() if scores is None else scores
    active = weight.active_count
    updated = weight.updated_count if explores else active
    try:
        if settings.exploration == "magnitude":
            return nested_top_k(scores, (updated, active))
        # seeded by what every rank and a resumed run know, so that no generator state has to be kept
        seed = zlib.crc32(f"{settings.seed}/{step}/{weight.name}".encode())
        return top_k_then_random(scores, active, updated, torch.Generator().manual_seed(seed))
    except NonFiniteScoresError:
        raise NonFiniteWeightError(
            f"weight '{weight.name}' holds NaN or infinity at step {step}; its sets were left as they were. "
            "Lower the learning rate, clip gradients, or resume from the last checkpoint"
        ) from None


class Selection:
    """The next sets of some weights, by their values of now, chosen in the background.

    Args:
        weights: whose sets are chosen.
        settings: of the run.
        step: optimizer steps done.
    """

    def __init__(self, weights: Sequence[SparseWeight], settings: Settings, step: int) -> None:
        self.step = step
        self._loads = {weight: weight.loads for weight in weights}
        snapshots = [(weight, weight.snapshot()) for weight in weights]

        def work() -> dict[str, Tensor]:
            return {weight.name: choose(weight, settings, step, True, scores()) for weight, scores in snapshots}

        self._chosen: dict[str, Tensor] | Future[dict[str, Tensor]] = _background.submit(work)

    def result(self) -> dict[str, Tensor]:
        """Weight name → tiers, waiting for them if need be.

        Raises:
            NonFiniteWeightError: a weight held NaN or infinity.
        """
        if isinstance(self._chosen, Future):
            self._chosen = self._chosen.result()
        return self._chosen

    def concerns(self, weights: Iterable[SparseWeight]) -> bool:
        """Whether it chose for any of them."""
        return any(weight in self._loads for weight in weights)

    @property
    def is_valid(self) -> bool:
        """Whether the weights are still those it chose by, but for training."""
        return all(weight.loads == loads for weight, loads in self._loads.items())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chosen": self.result()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only."""
        return {"step": self.step, "tiers": {name: tiers.cpu() for name, tiers in self.result().items()}}

    @classmethod
    def from_state(cls, state: Any, weights: Mapping[str, SparseWeight]) -> "Selection":
        """A selection that was saved before it took effect.

        Raises:
            TopKastError: it does not fit the weights.
        """
        step, tiers = (state.get("step"), state.get("tiers")) if isinstance(state, dict) else (None, None)
        if not isinstance(step, int) or not isinstance(tiers, dict) or not tiers or tiers.keys() - weights.keys():
            raise TopKastError("the saved Top-KAST state is damaged: its sets to come name other weights, or no step")
        for name, chosen in tiers.items():
            weight = weights[name]
            counts = (weight.updated_count - weight.active_count, weight.active_count)
            fits = isinstance(chosen, Tensor) and (chosen.dtype, chosen.shape) == (torch.uint8, weight.shape)
            if not fits or tuple(int((chosen == tier).sum()) for tier in (EXPLORING, ACTIVE)) != counts:
                raise TopKastError(f"the saved Top-KAST state is damaged: the sets to come of '{name}' don't fit it")
        selection = cls.__new__(cls)
        selection.step, selection._chosen = step, dict(tiers)
        selection._loads = {weights[name]: weights[name].loads for name in tiers}
        return selection
