"""The length of a Trainer's run in optimizer steps, in which moments that are fractions of the run are counted."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_topkast.errors import TopKastError
from lightning_topkast.topkast import TopKast
from lightning_topkast.training.averages import callbacks_of

# Length of a run of which nothing is known yet: too long for any fraction of it to be reached.
_FAR = 1 << 40


def estimated_steps(trainer: Trainer, pl_module: LightningModule) -> int | float:
    """Return the length of the run; -1 or infinity if it has no end.

    Exact under automatic optimization. Under manual optimization it is Lightning's guess of one step per batch, or
    `max_steps` of all optimizers together, which `RunLength` corrects.
    """
    steps = trainer.estimated_stepping_batches
    scheduler = next((c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)), None)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if scheduler is None or not pl_module.automatic_optimization or epochs in (None, -1) or math.isinf(batches):
        return steps
    factors = (scheduler.get_accumulate_grad_batches(epoch) for epoch in range(max(epochs, 1)))
    steps = sum(math.ceil(batches / factor) for factor in factors)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


class RunLength:
    """The length of a run in steps of each optimizer under manual optimization, which only the run itself shows.

    The steps still to come are those taken per share of the run so far, times the share that remains. It is looked at
    only where an optimizer has taken steps, so that gradients accumulated over several batches do no harm, and from the
    first batch with a step on, so that an optimizer may begin late.

    Args:
        topkast: the engine, attached, with its state loaded.
        state: of a run that is resumed, from `state_dict`; None if there is none.

    Raises:
        TopKastError: the state is damaged.
    """

    def __init__(self, topkast: TopKast, state: Any = None) -> None:
        self._topkast = topkast
        self._seen = list(topkast.optimizer_steps)
        # for each optimizer its steps, the Trainer's and the batches done, when it had first taken a step
        self._first: list[list[int] | None] = [None for _ in self._seen]
        if state is not None:
            state = state if isinstance(state, dict) else {}
            seen, first = state.get("seen", []), state.get("first", [])
            if not _are_counts(seen, len(self._seen)) or not isinstance(first, list) or len(first) != len(self._seen):
                raise TopKastError("the saved Top-KAST state is damaged: its run_length does not fit the optimizers")
            if not all(counts is None or _are_counts(counts, 3) for counts in first):
                raise TopKastError("the saved Top-KAST state is damaged: its run_length holds something but counts")
            self._seen, self._first = list(seen), list(first)

    def correct(self, trainer: Trainer) -> None:
        """Plan again before a batch, if steps were taken since the last one; until there were some, nothing is due."""
        now = [trainer.global_step, _batches_done(trainer)]
        totals: list[int | None] = []
        for place, (steps, seen) in enumerate(zip(self._topkast.optimizer_steps, self._seen, strict=True)):
            first, total = self._first[place], None
            if first is None:
                total = _FAR
                self._first[place] = [steps, *now] if steps != seen else None
            elif steps != seen:
                share, begun = _share(trainer, *now), _share(trainer, *first[1:])
                if share > begun:
                    total = round(steps + (1 - share) * (steps - first[0]) / (share - begun))
            totals.append(total)
        self._seen = list(self._topkast.optimizer_steps)
        self._topkast.replan(totals)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to plan the same: primitives only."""
        return {"seen": list(self._seen), "first": list(self._first)}


def warn_if_too_short(topkast: TopKast, steps: int | float) -> bool:
    """Warn if a run ends before its first refresh; return whether it does.

    Args:
        topkast: the engine.
        steps: length of the run; -1 or infinity if it has no end.
    """
    problem = topkast.too_short(steps)
    if problem:
        rank_zero_warn(problem)
    return problem is not None


def warn_if_unfinished(topkast: TopKast) -> None:
    """Warn at the end of a run if a ramp has not ended, or if exploration was to stop and has not."""
    if topkast.unfinished:
        rank_zero_warn(
            f"the run has ended before its sparsities are those asked for: {'; '.join(topkast.unfinished)}. Train "
            "longer, or choose an earlier moment (Ramp.end, Schedule.stop_exploring_at)"
        )


def _are_counts(found: Any, number: int) -> bool:
    return isinstance(found, list) and len(found) == number and all(isinstance(n, int) and n >= 0 for n in found)


def _batches_done(trainer: Trainer) -> int:
    loop, batches = trainer.fit_loop.epoch_loop, trainer.num_training_batches
    return loop.total_batch_idx if math.isinf(batches) else trainer.current_epoch * int(batches) + loop.batch_idx


def _share(trainer: Trainer, global_step: int, batches_done: int) -> float:
    """Return the share of the run that has passed, by whichever limit comes first."""
    share, batches, epochs = 0.0, trainer.num_training_batches, trainer.max_epochs
    if trainer.max_steps > 0:
        share = global_step / trainer.max_steps
    if epochs is not None and epochs > 0 and not math.isinf(batches):
        share = max(share, batches_done / (epochs * batches))
    return min(share, 1.0)
