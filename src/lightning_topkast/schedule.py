"""When the sets are chosen again, and when exploration stops."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefreshSchedule:
    """Refresh every `update_every` optimizer steps; explore until step `stop_exploration_at`.

    Args:
        update_every: N of the paper, in optimizer steps, at least 1.
        stop_exploration_at: step from which B = A (paper section 4.2, M → 0), or None for never.
    """

    update_every: int
    stop_exploration_at: int | None = None

    def refreshes_after(self, step: int) -> bool:
        """Whether the sets are chosen again once `step` optimizer steps are done."""
        return step % self.update_every == 0 or step == self.stop_exploration_at

    def explores_at(self, step: int) -> bool:
        """Whether B is larger than A for the optimizer step that follows `step` done ones."""
        return self.stop_exploration_at is None or step < self.stop_exploration_at


def step_of(moment: int | float | None, total_steps: int | float | None) -> int | None:
    """The optimizer step that `moment` means: an int is a step, a float a fraction of `total_steps`.

    Raises:
        ValueError: a fraction, but the length of the run is unknown or unlimited.
    """
    if moment is None or isinstance(moment, int):
        return moment
    if total_steps is None or total_steps in (-1, float("inf")):
        raise ValueError(
            f"stop_exploration_at={moment} is a fraction of the run, whose length is not known; give a step (an int), "
            "or bound the run (max_steps or max_epochs; TopKast: total_steps=...)"
        )
    return round(moment * total_steps)
