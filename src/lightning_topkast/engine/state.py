"""The saved state of an engine, checked before any of it is loaded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.structure import Structure

STATE_VERSION = 2


@dataclass(frozen=True)
class SavedState:
    """What `TopKast.state_dict` has returned; each weight and selection checks its own part.

    Args:
        weights: weight name → its state.
        steps: steps taken with each optimizer.
        refresh_count: number of refreshes.
        shrinkage: of the penalty, if its strength was worked out from the learning rate.
        selections: sets that were chosen, but had not taken effect.
        plans: weight name → the moments of its timeline, where the run has shown the steps of its own optimizer.
        planned_from: the moments in the settings from which the plans were made.
    """

    weights: dict[str, Any]
    steps: list[int]
    refresh_count: int
    shrinkage: float | None
    selections: list[Any]
    plans: dict[str, list[int | None]]
    planned_from: list[Any]

    @classmethod
    def read(cls, state: Any, structure: Structure, names: Collection[str], optimizers: int | None) -> "SavedState":
        """Read a state that a file may hold.

        Args:
            state: as it was loaded.
            structure: of this run.
            names: of the sparse weights.
            optimizers: number of optimizers of this run; None if it is not known yet.

        Raises:
            TopKastError: another format version, structure, other weights or optimizers, or a damaged state.
        """
        if not isinstance(state, Mapping):
            raise TopKastError(f"the saved Top-KAST state is damaged: expected a dict, got {type(state).__name__}")
        version = state.get("version")
        if not isinstance(version, int) or version != STATE_VERSION:
            raise TopKastError(
                f"expected a Top-KAST state of format version {STATE_VERSION}, got {version!r:.60}; a state of "
                "version 1 can be resumed only with the lightning-topkast that saved it"
            )
        weights, steps, refreshes = state.get("weights"), state.get("steps"), state.get("refresh_count")
        shrinkage, selections = state.get("shrinkage"), state.get("selections")
        if (
            not isinstance(weights, dict)
            or not isinstance(steps, list)
            or not isinstance(selections, list)
            or not isinstance(refreshes, int)
            or not isinstance(shrinkage, float | int | None)
            or not all(isinstance(count, int) and count >= 0 for count in (*steps, refreshes))
        ):
            raise TopKastError("the saved Top-KAST state is damaged: it lacks valid weights or step counts")
        plans, planned_from = state.get("plans", {}), state.get("planned_from", [])
        if (
            not isinstance(plans, dict)
            or not isinstance(planned_from, list)
            or ("plans" in state) != ("planned_from" in state)
        ):
            raise TopKastError("the saved Top-KAST state is damaged: its plans or what they were made from is lost")
        if not all(map(_are_moments, plans.values())):
            raise TopKastError("the saved Top-KAST state is damaged: its plans hold something else than steps")
        if state.get("structure") != str(structure):
            raise TopKastError(
                f"expected a Top-KAST state with structure '{structure}', got {state.get('structure')!r:.60}; resume "
                "with the structure it was saved with"
            )
        missing, extra = sorted(set(names) - weights.keys()), sorted(map(str, weights.keys() - set(names)))
        if missing or extra:
            raise TopKastError(
                f"the saved Top-KAST state belongs to other sparse weights: missing {missing or 'none'}, unexpected "
                f"{extra or 'none'}; resume with the model, include and exclude it was saved with"
            )
        if optimizers is not None and len(steps) != optimizers:
            raise TopKastError(f"expected a Top-KAST state with {optimizers} optimizers, got {len(steps)}")
        return cls(weights, steps, refreshes, shrinkage, selections, plans, planned_from)


def _are_moments(found: Any) -> bool:
    """Return whether these can be `Timeline.moments`."""
    if not isinstance(found, list) or len(found) != 5:
        return False
    if not all(moment is None or (isinstance(moment, int) and moment >= 0) for moment in found):
        return False
    *_, begin, end, _ = found
    return (begin is None) == (end is None) and (begin is None or begin < end)
