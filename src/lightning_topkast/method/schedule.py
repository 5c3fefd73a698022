"""When the sets are chosen again, how large they are then, and when exploration stops."""

from dataclasses import dataclass

Moment = int | float


@dataclass(frozen=True)
class SparsityRamp:
    """Start denser and reach the run's own sparsities step by step, at its refreshes.

    The sparsity at a step is `end + (start - end) · (1 - p)^power`, p being the share of the ramp that has passed
    (Zhu & Gupta 2017, equation 1, whose power is 3).

    Args:
        forward_sparsity: what to start from, in [0, 1).
        backward_sparsity: the same for the updated set, at most `forward_sparsity`.
        begin: until then nothing changes; an optimizer step (int) or a fraction of the run (float in [0, 1]).
        end: from then on the run has its own sparsities; like `begin`, and after it.
        power: of what is left of the ramp, above 0; 1 is a straight line.
    """

    forward_sparsity: float = 0.0
    backward_sparsity: float = 0.0
    begin: Moment = 0.0
    end: Moment = 0.5
    power: float = 3.0


@dataclass(frozen=True)
class RefreshSchedule:
    """Refresh every `update_every` optimizer steps; explore until step `stop_exploration_at`.

    Args:
        update_every: N of the paper, in optimizer steps, at least 1.
        stop_exploration_at: step from which B = A (paper section 4.2, M → 0), or None for never.
        stop_refreshing_at: step from which the sets stand still, or None for never.
        ramp_begin: step at which a ramp of the sparsities begins.
        ramp_end: step at which it ends, or None without a ramp.
        ramp_power: its power.
        total_steps: length of the run, if it is known.
    """

    update_every: int
    stop_exploration_at: int | None = None
    stop_refreshing_at: int | None = None
    ramp_begin: int = 0
    ramp_end: int | None = None
    ramp_power: float = 3.0
    total_steps: int | None = None

    def refreshes_after(self, step: int) -> bool:
        """Whether the sets are chosen again once `step` optimizer steps are done."""
        if step in (self.stop_exploration_at, self.ramp_end):
            return True
        stands_still = self.stop_refreshing_at is not None and step >= self.stop_refreshing_at
        return step % self.update_every == 0 and not stands_still

    def explores_at(self, step: int) -> bool:
        """Whether B is larger than A for the optimizer step that follows `step` done ones."""
        return self.stop_exploration_at is None or step < self.stop_exploration_at

    def remaining_ramp(self, step: int) -> float:
        """What is left after `step` steps of the way from the first sparsities to the last: from 1 to 0."""
        if self.ramp_end is None or step >= self.ramp_end:
            return 0.0
        passed = max(0.0, (step - self.ramp_begin) / (self.ramp_end - self.ramp_begin))
        return float((1 - passed) ** self.ramp_power)

    @property
    def horizon(self) -> int | None:
        """The step up to which sets change: where refreshes stop, else the end of the run, if it is known."""
        return self.total_steps if self.stop_refreshing_at is None else self.stop_refreshing_at


def step_of(moment: Moment | None, total_steps: int | float | None, name: str = "stop_exploration_at") -> int | None:
    """The optimizer step that `moment` means: an int is a step, a float a fraction of `total_steps`.

    Args:
        moment: what the user gave.
        total_steps: of the run; None, -1 or infinity if unknown.
        name: of the setting, for the error.

    Raises:
        ValueError: a fraction, but the length of the run is unknown or unlimited.
    """
    if moment is None or isinstance(moment, int):
        return moment
    if not is_known(total_steps):
        raise ValueError(
            f"{name}={moment} is a fraction of the run, whose length is not known; give a step (an int), "
            "or bound the run (max_steps or max_epochs; TopKast: total_steps=...)"
        )
    return round(moment * total_steps)  # type: ignore[operator]


def is_known(total_steps: int | float | None) -> bool:
    """Whether this is the length of a run, which Lightning gives as -1 or infinity where there is no end."""
    return total_steps not in (None, -1, float("inf"))
