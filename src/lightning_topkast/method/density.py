"""How many entries of each weight are active and updated."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from lightning_topkast.checks import check, check_choice, check_sparsities, name_matches
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.schedule import Ramp, Schedule, Timeline, moments
from lightning_topkast.method.stack import Stack
from lightning_topkast.method.structure import Structure

Distribution = Literal["uniform", "erk", "global", "global_normalized"]
COMPETING = ("global", "global_normalized")  # under which weights compete for the same places
Counts = dict[str, tuple[int, int]]  # weight name → |A| and |B|

# Refreshes of a run that stands for one of unknown length whose moments are all fractions.
_NOMINAL_REFRESHES = 1000


def uniform(
    shapes: Mapping[str, tuple[int, ...]], density: float, copies: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Give every weight the same density (the paper's ImageNet set-up)."""
    return dict.fromkeys(shapes, density)


def erdos_renyi_kernel(
    shapes: Mapping[str, tuple[int, ...]], density: float, copies: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Give a weight a density in proportion to (sum of its sizes) / (product of its sizes), at most 1.

    The total number of entries is that of `uniform`. A weight that would exceed density 1 is dense, and the others
    share the difference (Evci et al. 2020, "Rigging the Lottery", section 3). A larger total density gives every weight
    at least as much, so forward densities never exceed backward ones.

    Args:
        shapes: weight name → shape.
        density: share of all entries to keep, in [0, 1].
        copies: weight name → number of matrices of this shape that it consists of; 1 if it is not named.

    Returns:
        weight name → density in [0, 1].
    """
    number = dict.fromkeys(shapes, 1) | dict(copies or {})
    dense: set[str] = set()
    while True:
        open_names = [name for name in shapes if name not in dense]
        entries = {name: number[name] * prod(shape) for name, shape in shapes.items()}
        budget = density * sum(entries.values()) - sum(entries[name] for name in dense)
        weights = sum(number[name] * sum(shapes[name]) for name in open_names)
        scale = budget / weights if open_names else 0.0
        densities = {name: scale * sum(shapes[name]) / prod(shapes[name]) for name in open_names}
        full = [name for name, value in densities.items() if value > 1]
        if not full:
            return {name: densities.get(name, 1.0) for name in shapes}
        dense.update(full)


def normalized(scores: Tensor) -> Tensor:
    """Return a weight's scores divided by their mean; of a weight whose scores are all zero, these themselves."""
    scores = scores if scores.dtype == torch.float64 else scores.float()  # in which bfloat16 makes no new ties
    # rounded from float64, so that ranks with other numbers of threads, which sum in another order, get the same
    mean = scores.mean(dtype=torch.float64).to(scores.dtype)
    return scores / mean.masked_fill(mean == 0, 1)


# Where weights compete, it is for as many places as they have together under "uniform".
_DISTRIBUTIONS = {"uniform": uniform, "erk": erdos_renyi_kernel, "global": uniform, "global_normalized": uniform}


@dataclass(frozen=True)
class Allocation:
    """How the entries that a run keeps are divided among its weights.

    Args:
        forward_sparsity: share of a weight's entries that are zero in the forward pass, in [0, 1).
        backward_sparsity: share of entries without a gradient, in [0, forward_sparsity].
        distribution: "uniform" gives every weight the same density; "erk" is `erdos_renyi_kernel`; with "global" the
            weights compete for as many places as "uniform" gives them together, and with "global_normalized" they do so
            by `normalized` scores.
        overrides: glob pattern of parameter names → {"forward_sparsity": ..., "backward_sparsity": ...}; later patterns
            win.
        structure: what the sets consist of.

    Raises:
        TopKastError: a value is out of range.
    """

    forward_sparsity: float
    backward_sparsity: float
    distribution: Distribution
    overrides: Mapping[str, Mapping[str, float]]
    structure: Structure

    def __post_init__(self) -> None:
        check_sparsities(self.forward_sparsity, self.backward_sparsity)
        check_choice("distribution", self.distribution, Distribution)
        check(isinstance(self.overrides, Mapping), "overrides", self.overrides, "a mapping of glob patterns, or None")
        known = ("forward_sparsity", "backward_sparsity")
        for pattern, values in self.overrides.items():
            check(isinstance(pattern, str), "overrides", self.overrides, "a mapping with glob patterns as keys")
            valid = isinstance(values, Mapping) and bool(values) and not set(values) - set(known)
            check(valid, f"overrides['{pattern}']", values, f"a mapping with {' and '.join(known)}")
            check_sparsities(*self._sparsities_in(values), where=f"overrides['{pattern}']: ")

    @property
    def competes(self) -> bool:
        """Whether the weights without an override compete for the same places."""
        return self.distribution in COMPETING

    def all_sparsities(self) -> dict[str, tuple[float, float]]:
        """Every pair of forward and backward sparsity, with a suffix for messages that says where it is given."""
        overridden = {f" in overrides['{p}']": self._sparsities_in(values) for p, values in self.overrides.items()}
        return {"": (self.forward_sparsity, self.backward_sparsity), **overridden}

    def overridden(self, names: Iterable[str]) -> dict[str, tuple[float, float]]:
        """Forward and backward density of the weights that have an override.

        Raises:
            TopKastError: an override that matches none of the names.
        """
        names = list(names)
        densities: dict[str, tuple[float, float]] = {}
        for pattern, values in self.overrides.items():
            matched = [name for name in names if name_matches(name, pattern)]
            if not matched:
                raise TopKastError(f"overrides: '{pattern}' matches no sparse weight; they are: {', '.join(names)}")
            forward, backward = self._sparsities_in(values)
            densities |= dict.fromkeys(matched, (1 - forward, 1 - backward))
        return densities

    def counts(
        self,
        shapes: Mapping[str, torch.Size],
        sparsities: tuple[float, float] | None = None,
        stacks: Collection[str] = (),
    ) -> Counts:
        """Exact sizes of A and B of every sparse weight, in entries; where blocks differ in size, those on average.

        Args:
            shapes: weight name → shape.
            sparsities: forward and backward sparsity of the weights without an override; None: those of the run.
            stacks: names of the weights that are `Stack`s; each of their matrices gets equally many entries.

        Raises:
            TopKastError: an override that matches no sparse weight, or a weight too small for one active entry.
        """
        overridden = self.overridden(shapes)
        copies = {name: shape[0] for name, shape in shapes.items() if name in stacks}
        matrices = {name: shape[1:] if name in copies else shape for name, shape in shapes.items()}
        free = {name: shape for name, shape in matrices.items() if name not in overridden}
        densities_of = _DISTRIBUTIONS[self.distribution]
        sparsities = sparsities or (self.forward_sparsity, self.backward_sparsity)
        forward, backward = (densities_of(free, 1 - sparsity, copies) for sparsity in sparsities)
        counts = {}
        for name, shape in shapes.items():
            structure = Stack(self.structure) if name in copies else self.structure
            density, updated_density = overridden.get(name) or (forward[name], backward[name])
            active = structure.active_count(density, shape)
            if active < 1:
                what = "each matrix of weight" if name in copies else "weight"
                number, (one, many) = self.structure.grid(matrices[name]).numel(), self.structure.noun
                raise TopKastError(
                    f"{what} '{name}' has {number} {many}, too few for one active {one} at forward density "
                    f"{density:.4g}; exclude it, or give it a lower forward_sparsity through overrides"
                )
            counts[name] = (active, max(structure.updated_count(updated_density, shape), active))
        return counts

    def _sparsities_in(self, override: Mapping[str, float]) -> tuple[float, float]:
        """Forward and backward sparsity of an override, the run's own where it names none."""
        forward = override.get("forward_sparsity", self.forward_sparsity)
        return forward, override.get("backward_sparsity", min(self.backward_sparsity, forward))


@dataclass(frozen=True)
class SetSizes:
    """Sizes of all weights' sets over the steps of a run.

    Args:
        allocation: the sizes at the end of the run.
        schedule: when sets change.
        ramp: along which the sizes change; None: they do not.
        shapes: weight name → shape.
        stacks: names of the weights that are stacks of matrices.
        timeline: `schedule` and `ramp` in steps; None before `planned`.
    """

    allocation: Allocation
    schedule: Schedule
    ramp: Ramp | None
    shapes: Mapping[str, torch.Size]
    stacks: Collection[str] = ()
    _timeline: Timeline | None = None

    def planned(self, total_steps: int | float | None) -> "SetSizes":
        """The sizes over a run of `total_steps` optimizer steps.

        Raises:
            TopKastError: a moment is a fraction of a run of unknown length, or a ramp ends before it begins.
        """
        return replace(self, _timeline=Timeline.of(self.schedule, self.ramp, total_steps))

    def replanned(self, total_steps: int, step: int) -> "SetSizes":
        """The sizes over a run that turns out, after `step` steps, to have `total_steps`; see `Timeline.replanned`."""
        return replace(self, _timeline=self.timeline.replanned(self.schedule, self.ramp, total_steps, step))

    def with_moments(self, moments: Sequence[int | None]) -> "SetSizes":
        """The sizes by a timeline with these `Timeline.moments`."""
        return replace(self, _timeline=Timeline.of_moments(self.schedule, self.ramp, moments))

    @property
    def final(self) -> Counts:
        """Sizes of the sets at the end of the run, while exploring."""
        return self.allocation.counts(self.shapes, None, self.stacks)

    @property
    def is_planned(self) -> bool:
        """Whether the step of every moment is known."""
        return self._timeline is not None

    @property
    def timeline(self) -> Timeline:
        """When the sets change, in steps."""
        return self._timeline or Timeline(replace(self.schedule, stop_exploring_at=None, stop_updating_at=None))

    @property
    def changes_size(self) -> bool:
        """Whether a weight's sets have other sizes during the run than `Allocation.counts` gives them."""
        return self.ramp is not None or self.allocation.competes

    def sparsities(self, remaining: float) -> tuple[float, float]:
        """Forward and backward sparsity where this share of the ramp remains: 1 at its beginning, 0 at its end."""
        end = (self.allocation.forward_sparsity, self.allocation.backward_sparsity)
        if self.ramp is None or remaining == 0:
            return end
        start = (self.ramp.forward_sparsity, self.ramp.backward_sparsity)
        forward, backward = (last + (first - last) * remaining for first, last in zip(start, end, strict=True))
        return forward, backward

    def at(self, step: int) -> Counts:
        """Sizes of the sets that are chosen after `step` optimizer steps."""
        remaining = self.timeline.remaining_ramp(step) if self.is_planned else 1.0
        counts = self.allocation.counts(self.shapes, self.sparsities(remaining), self.stacks)
        if self.timeline.explores_at(step):
            return counts
        return {name: (active, active) for name, (active, _) in counts.items()}

    @property
    def is_mean_known(self) -> bool:
        """Whether `mean_densities` is known without the run's length."""
        return not any(isinstance(moment, int) and moment > 0 for moment in moments(self.schedule, self.ramp))

    def mean_densities(self, total_steps: int | None, needs_gradient: bool) -> dict[str, tuple[float, float]]:
        """Weight name → forward and backward density, averaged over the steps of a run.

        Args:
            total_steps: length of the run; None if it is not known. Then fractions are those of a long run, and where
                moments are steps, the densities are those of its first step (`is_mean_known`).
            needs_gradient: whether the step before a refresh computes the whole gradient: its backward density is 1.
        """
        nominal = self.schedule.update_every * _NOMINAL_REFRESHES
        planned = self.planned(total_steps or nominal)
        total_steps = total_steps or (nominal if self.is_mean_known else 1)
        refreshes = [step for step in range(1, total_steps) if planned.timeline.refreshes_after(step)]
        sums = {name: [0.0, 0.0] for name in self.shapes}
        counts: Counts = {}
        key: tuple[float, bool] | None = None
        for begin, end in zip([0, *refreshes], [*refreshes, total_steps], strict=True):
            present = (planned.timeline.remaining_ramp(begin), planned.timeline.explores_at(begin))
            if present != key:
                key, counts = present, planned.at(begin)
            whole = int(needs_gradient and planned.timeline.refreshes_after(end))
            for name, (active, updated) in counts.items():
                size = self.shapes[name].numel()
                sums[name][0] += (end - begin) * active / size
                sums[name][1] += (end - begin - whole) * updated / size + whole
        return {name: (forward / total_steps, backward / total_steps) for name, (forward, backward) in sums.items()}
