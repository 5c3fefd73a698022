"""How large the sets are in the course of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.density import allocate
from lightning_topkast.method.schedule import RefreshSchedule, is_known, step_of
from lightning_topkast.settings import Settings

Counts = dict[str, tuple[int, int]]  # weight name → sizes of A and B

# Steps that stand for a run of unknown length of which all moments are fractions.
_NOMINAL_REFRESHES = 1000


@dataclass(frozen=True)
class Course:
    """The sizes of all weights' sets, step by step.

    Args:
        settings: of the run.
        shapes: of the sparse weights, by name.
        schedule: when the sets are chosen; None before `planned`, when a run has not begun.
    """

    settings: Settings
    shapes: Mapping[str, torch.Size]
    _schedule: RefreshSchedule | None = None

    def planned(self, total_steps: int | float | None) -> "Course":
        """The course of a run of this many optimizer steps.

        Raises:
            TopKastError: moments are fractions of it, and the length is unknown; or a ramp would end before it begins.
        """
        settings, rule, ramp = self.settings, self.settings.chosen_rule, self.settings.chosen_ramp
        stop = rule.stop_refreshing_at if settings.stop_refreshing_at is None else settings.stop_refreshing_at
        known = round(total_steps) if total_steps is not None and is_known(total_steps) else None
        try:
            schedule = RefreshSchedule(
                settings.update_every,
                step_of(settings.stop_exploration_at, total_steps, "stop_exploration_at"),
                step_of(stop, total_steps, "stop_refreshing_at"),
                total_steps=known,
            )
            if ramp is not None:
                begin, end = (step_of(getattr(ramp, n), total_steps, f"ramp: {n}") for n in ("begin", "end"))
                assert begin is not None  # a ramp has both moments
                schedule = replace(schedule, ramp_begin=begin, ramp_end=end, ramp_power=float(ramp.power))
        except ValueError as error:
            raise TopKastError(str(error)) from None
        if rule.needs_length and schedule.horizon is None:
            raise TopKastError(
                f"{type(rule).__name__} drops ever fewer entries until the end of the run, whose length is not known: "
                "give stop_refreshing_at, or bound the run (max_steps or max_epochs; TopKast: total_steps=...)"
            )
        if schedule.ramp_end is not None and schedule.ramp_begin >= schedule.ramp_end:
            raise TopKastError(f"ramp: it begins at step {schedule.ramp_begin} and ends at {schedule.ramp_end}")
        return replace(self, _schedule=schedule)

    @property
    def is_planned(self) -> bool:
        """Whether it is known when everything happens."""
        return self._schedule is not None

    @property
    def schedule(self) -> RefreshSchedule:
        """When the sets are chosen."""
        return self._schedule or RefreshSchedule(self.settings.update_every)

    def counts_at(self, step: int) -> Counts:
        """Sizes of sets that are chosen once `step` optimizer steps are done."""
        ramp = self.schedule.remaining_ramp(step) if self.is_planned else 1.0
        counts = allocate(self.shapes, self.settings, ramp)
        if self.schedule.explores_at(step):
            return counts
        return {name: (active, active) for name, (active, _) in counts.items()}

    def passed(self, step: int) -> float | None:
        """Share of the time in which sets change that has passed, or None if no end is known."""
        horizon = self.schedule.horizon
        return None if horizon is None else min(1.0, step / max(horizon, 1))

    def looks_at_gradients(self, steps: int) -> bool:
        """Whether the gradients of the step that follows `steps` done ones decide the next sets, also outside B."""
        return self.settings.chosen_rule.needs_gradient and self.schedule.refreshes_after(steps + 1)

    @property
    def is_mean_known(self) -> bool:
        """Whether `mean_densities` is known without the run's length."""
        return not any(isinstance(moment, int) and moment > 0 for moment in self.settings.moments)

    def mean_densities(self, total_steps: int | None = None) -> dict[str, tuple[float, float]]:
        """Weight name → forward and backward density, on average over the steps of a run.

        A step that looks at the whole gradient has backward density 1.

        Args:
            total_steps: of the run; None if unknown. Then fractions are those of a long run, and where moments are
                steps, the densities are those of its first step (`is_mean_known`).
        """
        nominal = self.settings.update_every * _NOMINAL_REFRESHES
        course = self.planned(total_steps or nominal)
        total_steps = total_steps or (nominal if self.is_mean_known else 1)
        refreshes = [step for step in range(1, total_steps) if course.schedule.refreshes_after(step)]
        sums = {name: [0.0, 0.0] for name in self.shapes}
        counts: Counts = {}
        key: tuple[float, bool] | None = None
        for begin, end in zip([0, *refreshes], [*refreshes, total_steps], strict=True):
            present = (course.schedule.remaining_ramp(begin), course.schedule.explores_at(begin))
            if present != key:
                key, counts = present, course.counts_at(begin)
            whole = int(course.looks_at_gradients(end - 1))
            for name, (active, updated) in counts.items():
                size = self.shapes[name].numel()
                sums[name][0] += (end - begin) * active / size
                sums[name][1] += (end - begin - whole) * updated / size + whole
        return {name: (forward / total_steps, backward / total_steps) for name, (forward, backward) in sums.items()}
