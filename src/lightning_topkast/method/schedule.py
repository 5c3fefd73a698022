"""When the sets are chosen again, when exploration stops, and when a ramp of the sparsities begins and ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_topkast.checks import check, check_sparsities, is_count, is_number
from lightning_topkast.errors import TopKastError

StepOrFraction = int | float


@dataclass(frozen=True)
class Schedule:
    """When a run refreshes its sets A and B.

    Args:
        update_every: optimizer steps between two refreshes (N of the paper, which saw no loss at 100), at least 1.
        delay: optimizer steps between choosing the sets, in a background thread, and their taking effect; 0 waits for
            them. Results do not depend on timing. Below `update_every`.
        stop_exploring_at: from here on B = A (paper section 4.2, M → 0); an optimizer step (int), a fraction of the
            run (float in [0, 1]), or None for never.
        stop_updating_at: from here on the sets stay as they are; like `stop_exploring_at`.

    Raises:
        TopKastError: a value is out of range.
    """

    update_every: int = 100
    delay: int = 0
    stop_exploring_at: StepOrFraction | None = None
    stop_updating_at: StepOrFraction | None = None

    def __post_init__(self) -> None:
        check(is_count(self.update_every, 1), "update_every", self.update_every, "an int of at least 1")
        below = f"an int of at least 0 and below update_every={self.update_every}"
        check(is_count(self.delay, 0) and self.delay < self.update_every, "delay", self.delay, below)
        for name in ("stop_exploring_at", "stop_updating_at"):
            value = getattr(self, name)
            check(value is None or _is_step_or_fraction(value), name, value, f"{_STEP_OR_FRACTION}, or None")


@dataclass(frozen=True)
class Ramp:
    """Sparsities that begin lower and rise to those of the run, refresh by refresh.

    The sparsity at a step is `end + (start - end) · (1 - p)^power`, where p is the share of the ramp that has passed
    (Zhu & Gupta 2017, equation 1, with power 3). Gradual magnitude
    pruning is `TopKastCallback(0.9, 0.9, ramp=Ramp(end=0.75), schedule=Schedule(stop_updating_at=0.75), penalty=None)`.

    Args:
        forward_sparsity: forward sparsity at the beginning, in [0, 1).
        backward_sparsity: backward sparsity at the beginning, at most `forward_sparsity`.
        begin: the sparsities do not change before; an optimizer step (int) or a fraction of the run (float in [0, 1]).
        end: the run has its own sparsities from here on; like `begin`, and after it.
        power: exponent of the remaining share of the ramp, above 0; 1 is a straight line.

    Raises:
        TopKastError: a value is out of range.
    """

    forward_sparsity: float = 0.0
    backward_sparsity: float = 0.0
    begin: StepOrFraction = 0.0
    end: StepOrFraction = 0.5
    power: float = 3.0

    def __post_init__(self) -> None:
        check_sparsities(self.forward_sparsity, self.backward_sparsity, where="Ramp.")
        for name in ("begin", "end"):
            value = getattr(self, name)
            check(_is_step_or_fraction(value), f"Ramp.{name}", value, _STEP_OR_FRACTION)
        if type(self.begin) is type(self.end) and self.begin >= self.end:
            raise TopKastError(f"expected the ramp to end after it begins, got begin={self.begin} and end={self.end}")
        check(is_number(self.power) and self.power > 0, "Ramp.power", self.power, "a number above 0")


@dataclass(frozen=True)
class Timeline:
    """A schedule and a ramp with every moment as an optimizer step.

    Args:
        schedule: its moments are steps.
        ramp: likewise; None without one.
        total_steps: length of the run in optimizer steps; None if it is not known.
    """

    schedule: Schedule
    ramp: Ramp | None = None
    total_steps: int | None = None

    @classmethod
    def of(cls, schedule: Schedule, ramp: Ramp | None, total_steps: int | float | None) -> "Timeline":
        """Turn fractions of a run into steps.

        Args:
            schedule: as the user gave it.
            ramp: likewise.
            total_steps: length of the run in optimizer steps; None, -1 or infinity if it is not known.

        Raises:
            TopKastError: a fraction, but the length of the run is not known; or a ramp that ends before it begins.
        """
        known = round(total_steps) if total_steps is not None and _is_known(total_steps) else None
        schedule = replace(
            schedule,
            stop_exploring_at=_step_of(schedule.stop_exploring_at, known, "stop_exploring_at"),
            stop_updating_at=_step_of(schedule.stop_updating_at, known, "stop_updating_at"),
        )
        if ramp is not None:
            begin, end = (_step_of(getattr(ramp, name), known, f"Ramp.{name}") for name in ("begin", "end"))
            assert begin is not None
            assert end is not None
            ramp = replace(ramp, begin=begin, end=end)
        return cls(schedule, ramp, known)

    def replanned(self, schedule: Schedule, ramp: Ramp | None, total_steps: int, step: int) -> "Timeline":
        """Correct the moments that are fractions of a run, after `step` steps of it.

        A moment that has passed stays, so that none takes effect twice. One that would have passed already takes effect
        after the next step.

        Args:
            schedule: as the user gave it.
            ramp: likewise.
            total_steps: length of the run in optimizer steps, as far as it is known by now.
            step: number of steps taken.
        """

        def moved(asked: StepOrFraction | None, present: StepOrFraction | None, earliest: int) -> Any:
            if not isinstance(asked, float) or present is None or present <= step:
                return present
            return max(round(asked * total_steps), earliest)

        own, present = self.schedule, self.ramp
        own = replace(
            own,
            stop_exploring_at=moved(schedule.stop_exploring_at, own.stop_exploring_at, step + 1),
            stop_updating_at=moved(schedule.stop_updating_at, own.stop_updating_at, step + 1),
        )
        if ramp is not None and present is not None:
            begin = moved(ramp.begin, present.begin, step + 1)
            end = moved(ramp.end, present.end, step + 1)
            present = replace(present, begin=begin, end=max(end, begin + 1))
        return Timeline(own, present, total_steps)

    @property
    def moments(self) -> list[int | None]:
        """Every moment as a step, and the length of the run: what `of_moments` makes the timeline from again."""
        stops = (self.schedule.stop_exploring_at, self.schedule.stop_updating_at)
        ramp = (None, None) if self.ramp is None else (self.ramp.begin, self.ramp.end)
        return [None if moment is None else int(moment) for moment in (*stops, *ramp, self.total_steps)]

    @classmethod
    def of_moments(cls, schedule: Schedule, ramp: Ramp | None, moments: Sequence[Any]) -> "Timeline":
        """Make the timeline whose `moments` these are."""
        stop_exploring_at, stop_updating_at, begin, end, total_steps = moments
        schedule = replace(schedule, stop_exploring_at=stop_exploring_at, stop_updating_at=stop_updating_at)
        return cls(schedule, ramp and replace(ramp, begin=begin, end=end), total_steps)

    def refreshes_after(self, step: int) -> bool:
        """Whether the sets are chosen again after `step` optimizer steps."""
        if step == self.schedule.stop_exploring_at or (self.ramp is not None and step == self.ramp.end):
            return True
        stop = self.schedule.stop_updating_at
        return step % self.schedule.update_every == 0 and (stop is None or step < stop)

    @property
    def first_refresh(self) -> int | None:
        """The number of steps after which the sets are chosen again for the first time; None if they never are."""
        stop, every = self.schedule.stop_updating_at, self.schedule.update_every
        moments = [self.schedule.stop_exploring_at, None if self.ramp is None else self.ramp.end]
        moments.append(every if stop is None or every < stop else None)
        return min((int(moment) for moment in moments if moment), default=None)

    def last_choice(self, step: int) -> int:
        """The step at which the sets that are in use after `step` steps were chosen; 0 if it was before training."""
        every, stop = self.schedule.update_every, self.schedule.stop_updating_at
        # what was chosen later does not take effect yet, unless exploration has stopped
        chosen = max(step - self.schedule.delay, 0) if self.explores_at(step) else step
        last = chosen if stop is None else min(chosen, int(stop) - 1)
        moments = [max(last, 0) // every * every]
        if self.ramp is not None and self.ramp.end <= chosen:
            moments.append(int(self.ramp.end))
        if not self.explores_at(step):
            moments.append(int(self.schedule.stop_exploring_at or 0))
        return max(moments)

    def explores_at(self, step: int) -> bool:
        """Whether B is larger than A in the optimizer step that follows `step` steps."""
        stop = self.schedule.stop_exploring_at
        return stop is None or step < stop

    def remaining_ramp(self, step: int) -> float:
        """The remaining share of the way from the first sparsities to the last after `step` steps: from 1 to 0."""
        ramp = self.ramp
        if ramp is None or step >= ramp.end:
            return 0.0
        passed = max(0.0, (step - ramp.begin) / (ramp.end - ramp.begin))
        return float((1 - passed) ** ramp.power)

    @property
    def horizon(self) -> int | None:
        """The step up to which sets change: where refreshes stop, else the end of the run, if it is known."""
        stop = self.schedule.stop_updating_at
        return self.total_steps if stop is None else int(stop)

    def progress(self, step: int) -> float | None:
        """Share of the time in which sets change that has passed, in [0, 1]; None if no end is known."""
        return None if self.horizon is None else min(1.0, step / max(self.horizon, 1))


_STEP_OR_FRACTION = "a step (int of at least 0) or a fraction of the run (float in [0, 1])"


def needs_length(schedule: Schedule, ramp: Ramp | None) -> bool:
    """Whether a moment is a fraction of a run, whose length must be known then."""
    return any(isinstance(moment, float) and moment > 0 for moment in moments(schedule, ramp))


def moments(schedule: Schedule, ramp: Ramp | None) -> list[StepOrFraction]:
    """The steps, or fractions of the run, at which something other than the sets changes."""
    found = [schedule.stop_exploring_at, schedule.stop_updating_at, *([ramp.begin, ramp.end] if ramp else [])]
    return [moment for moment in found if moment is not None]


def in_words(moment: StepOrFraction | None) -> str:
    """A moment as the user gave it."""
    return f"{moment:g} of the run" if isinstance(moment, float) else f"step {moment}"


def _is_step_or_fraction(value: Any) -> bool:
    return is_number(value) and value >= 0 and (isinstance(value, int) or value <= 1)


def _step_of(moment: StepOrFraction | None, total_steps: int | None, name: str) -> int | None:
    """The optimizer step of a moment: an int is a step, a float a fraction of the run."""
    if moment is None or isinstance(moment, int):
        return moment
    if moment == 0:  # whatever the length
        return 0
    if total_steps is None:
        raise TopKastError(
            f"{name}={moment} is a fraction of the run, but the length of the run is not known; give a step (an int), "
            "or bound the run (Trainer: max_steps or max_epochs; attach: total_steps)"
        )
    return round(moment * total_steps)


def _is_known(total_steps: int | float) -> bool:
    """Whether this is the length of a run; Lightning gives -1 or infinity if it has no end."""
    return total_steps not in (-1, float("inf"))
