"""The settings of one Top-KAST run, checked when they are given."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.distribution import DISTRIBUTIONS
from lightning_topkast.method.penalty import Penalty
from lightning_topkast.method.rule import Exploration, Rule
from lightning_topkast.method.schedule import Moment, SparsityRamp
from lightning_topkast.method.structure import Blocks, Entries, NOfM, granularity_of
from lightning_topkast.ops import BlockOperators, Operators

Distribution = Literal["uniform", "erk", "global"]
Execution = Literal["masked", "packed", "compact", "auto"]
AllReduce = Literal["dense", "sparse", "sparse_bf16", "sparse_fp16"]


@dataclass(frozen=True)
class Settings:
    """Arguments shared by `TopKast` and `TopKastCallback`; see the latter for their meaning.

    Raises:
        TopKastError: a value out of range, with the range.
    """

    forward_sparsity: float
    backward_sparsity: float
    update_every: int = 100
    refresh_delay: int = 0
    distribution: Distribution = "uniform"
    overrides: Mapping[str, Mapping[str, float]] | None = None
    exploration: Exploration = "magnitude"
    stop_exploration_at: Moment | None = None
    stop_refreshing_at: Moment | None = None
    rule: Rule | None = None
    granularity: str = "entry"
    block_shape: Sequence[int] = (32, 32)
    ramp: SparsityRamp | None = None
    powerpropagation: float = 1.0
    penalty: Penalty = "l2"
    penalty_strength: float = 1e-4
    penalty_shrinkage: float | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    include_types: list[str] | None = None
    exclude_types: list[str] | None = None
    keep_first_dense: bool = True
    keep_last_dense: bool = True
    reset_optimizer_state: bool = True
    execution: Execution = "masked"
    operators: Operators | BlockOperators = "auto"
    strict: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_sparsities(self.forward_sparsity, self.backward_sparsity)
        for name in ("include", "exclude", "include_types", "exclude_types"):
            patterns = getattr(self, name)
            listed = isinstance(patterns, list | tuple) and all(isinstance(pattern, str) for pattern in patterns)
            _check(patterns is None or listed, name, patterns, "a list of strings or None")
        for name in ("keep_first_dense", "keep_last_dense", "reset_optimizer_state", "strict"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        _check(_is_number(self.seed) and isinstance(self.seed, int), "seed", self.seed, "an int")
        _check(
            self.overrides is None or isinstance(self.overrides, Mapping),
            "overrides", self.overrides, "a mapping of glob patterns to sparsities, or None",
        )  # fmt: skip
        for pattern, values in (self.overrides or {}).items():
            known = {"forward_sparsity", "backward_sparsity"}
            if not isinstance(values, Mapping) or not values or set(values) - known:
                raise TopKastError(
                    f"overrides['{pattern}'] takes forward_sparsity and backward_sparsity, got {values!r}"
                )
            check_sparsities(*self.sparsities_in(values), where=f"overrides['{pattern}']: ")
        _check(
            _is_number(self.update_every) and isinstance(self.update_every, int) and self.update_every >= 1,
            "update_every",
            self.update_every,
            "an int of at least 1",
        )
        delay = self.refresh_delay
        _check(
            _is_number(delay) and isinstance(delay, int) and 0 <= delay < self.update_every,
            "refresh_delay", delay, f"an int of at least 0 and below update_every={self.update_every}",
        )  # fmt: skip
        _check(
            self.distribution in DISTRIBUTIONS, "distribution", self.distribution, f"one of {', '.join(DISTRIBUTIONS)}"
        )
        _check(
            self.exploration in get_args(Exploration),
            "exploration",
            self.exploration,
            f"one of {', '.join(get_args(Exploration))}",
        )
        _check(
            self.penalty in get_args(Penalty),
            "penalty",
            self.penalty,
            f"one of {', '.join(get_args(Penalty))} (penalty_strength=0 turns it off)",
        )
        valid = get_args(Execution)
        _check(self.execution in valid, "execution", self.execution, f"one of {', '.join(valid)}")
        if self.execution != "masked" and not self.reset_optimizer_state:
            raise TopKastError(
                f"execution='{self.execution}' keeps no optimizer state outside the updated set, so "
                "reset_optimizer_state=False can't be honoured; leave it on, or train with execution='masked'"
            )
        for name in ("stop_exploration_at", "stop_refreshing_at"):
            moment = getattr(self, name)
            _check(moment is None or _is_moment(moment), name, moment, f"{_A_MOMENT} or None")
        _check(
            _is_number(self.powerpropagation) and self.powerpropagation >= 1,
            "powerpropagation", self.powerpropagation, "a number of at least 1, which turns it off",
        )  # fmt: skip
        self._check_granularity()
        self._check_rule()
        self._check_ramp()
        _check(
            _is_number(self.penalty_strength) and self.penalty_strength >= 0,
            "penalty_strength",
            self.penalty_strength,
            "at least 0",
        )
        shrinkage = self.penalty_shrinkage
        _check(
            shrinkage is None or (_is_number(shrinkage) and 0 <= shrinkage < 1),
            "penalty_shrinkage",
            shrinkage,
            "in [0, 1)",
        )
        if shrinkage is not None and self.penalty != "l2":
            raise TopKastError(
                f"penalty_shrinkage is the share an entry loses per step, which only penalty='l2' keeps constant; with "
                f"penalty='{self.penalty}' give penalty_strength instead"
            )

    def _check_granularity(self) -> None:
        sides = self.block_shape
        _check(
            isinstance(sides, list | tuple)
            and len(sides) == 2
            and all(isinstance(side, int) and _is_number(side) and side >= 1 for side in sides),
            "block_shape", sides, "two ints of at least 1: outputs and inputs",
        )  # fmt: skip
        known = isinstance(self.granularity, str) and granularity_of(self.granularity, sides) is not None
        _check(known, "granularity", self.granularity, "entry, block, or N:M with N below M, such as 2:4")
        units = self.chosen_granularity
        operators = get_args(BlockOperators if isinstance(units, Blocks) else Operators)
        valid = f"one of {', '.join(operators)}, with granularity='{self.granularity}'"
        _check(self.operators in operators, "operators", self.operators, valid)
        if not isinstance(units, NOfM):
            return
        density = units.n / units.m
        for where, forward in {
            "": self.forward_sparsity,
            **{f" in overrides['{p}']": self.sparsities_in(v)[0] for p, v in (self.overrides or {}).items()},
        }.items():
            if abs(1 - forward - density) > 1e-3:
                raise TopKastError(
                    f"granularity='{units}' makes {units.n} of {units.m} neighbours active, so expected "
                    f"forward_sparsity={1 - density:.4g}{where}, got {forward}"
                )
        others = {
            "distribution": (self.distribution, "uniform"), "exploration": (self.exploration, "magnitude"),
            "rule": (self.rule, None), "ramp": (self.ramp, None),
        }  # fmt: skip
        for name, (given, needed) in others.items():
            if given != needed:
                raise TopKastError(f"granularity='{units}' needs {name}={needed}, got {given}")

    def _check_rule(self) -> None:
        _check(self.rule is None or isinstance(self.rule, Rule), "rule", self.rule, "a rule such as RigL(), or None")
        name = type(self.chosen_rule).__name__
        if not self.chosen_rule.explores:
            for where, (forward, backward) in {
                "": (self.forward_sparsity, self.backward_sparsity),
                **{f" in overrides['{p}']": self.sparsities_in(v) for p, v in (self.overrides or {}).items()},
            }.items():
                if forward != backward:
                    raise TopKastError(
                        f"{name} updates what is active and nothing else, so expected "
                        f"backward_sparsity=forward_sparsity{where}, got {backward} and {forward}"
                    )
            if self.penalty_shrinkage or self.exploration != "magnitude" or self.stop_exploration_at is not None:
                raise TopKastError(
                    f"{name} does not explore: leave out exploration, stop_exploration_at and penalty_shrinkage"
                )
        if self.chosen_rule.needs_gradient and self.execution != "masked":
            raise TopKastError(
                f"{name} needs the gradient of every entry, of which execution='{self.execution}' has only those of "
                "the updated set: train with execution='masked'"
            )
        if self.chosen_rule.grows_from_zero and self.powerpropagation != 1:
            raise TopKastError(
                f"{name} grows entries from zero, where powerpropagation={self.powerpropagation} leaves no gradient, "
                "so that they would never learn: leave it at 1"
            )
        if self.refresh_delay and type(self.chosen_rule) is not Rule:
            raise TopKastError(f"refresh_delay={self.refresh_delay} is for Top-KAST's own rule: {name} needs 0")

    def _check_ramp(self) -> None:
        _check(self.ramp is None or isinstance(self.ramp, SparsityRamp), "ramp", self.ramp, "a SparsityRamp or None")
        ramp = self.chosen_ramp
        if ramp is not None:
            check_sparsities(ramp.forward_sparsity, ramp.backward_sparsity, where="ramp: ")
            for name in ("forward_sparsity", "backward_sparsity"):
                if getattr(ramp, name) > getattr(self, name):
                    raise TopKastError(
                        f"ramp: it starts denser, so expected {name} of at most {getattr(self, name)}, the run's own, "
                        f"got {getattr(ramp, name)}"
                    )
            for name in ("begin", "end"):
                _check(_is_moment(getattr(ramp, name)), f"ramp: {name}", getattr(ramp, name), _A_MOMENT)
            if type(ramp.begin) is type(ramp.end) and ramp.begin >= ramp.end:
                raise TopKastError(f"ramp: it ends after its begin, got begin={ramp.begin} and end={ramp.end}")
            _check(_is_number(ramp.power) and ramp.power > 0, "ramp: power", ramp.power, "a number above 0")
            if self.rule is not None and self.ramp is not None and self.rule.ramp is not None:
                raise TopKastError(f"{type(self.rule).__name__} brings its own ramp: leave out ramp={self.ramp}")
        for what, given in (("a ramp", ramp is not None), ("distribution='global'", self.distribution == "global")):
            if given and (self.execution != "masked" or self.refresh_delay):
                raise TopKastError(
                    f"{what} changes the size of every weight's sets, which needs execution='masked' and "
                    f"refresh_delay=0, got '{self.execution}' and {self.refresh_delay}"
                )

    @property
    def chosen_rule(self) -> Rule:
        """How the sets are chosen: Top-KAST's rule unless another was given."""
        return self.rule or Rule()

    @property
    def chosen_granularity(self) -> Entries:
        """What the sets are made of."""
        units = granularity_of(self.granularity, self.block_shape)
        assert units is not None  # checked
        return units

    @property
    def chosen_ramp(self) -> SparsityRamp | None:
        """The ramp of the sparsities: the rule's own or the run's."""
        return self.chosen_rule.ramp or self.ramp

    @property
    def sizes_vary(self) -> bool:
        """Whether a weight's sets have other sizes in the course of the run than `allocate` gives them."""
        return self.chosen_ramp is not None or self.distribution == "global"

    @property
    def moments(self) -> list[Moment]:
        """The steps, or fractions of the run, at which something changes besides the sets."""
        ramp, stop = self.chosen_ramp, self.stop_refreshing_at
        stop = self.chosen_rule.stop_refreshing_at if stop is None else stop
        moments = [self.stop_exploration_at, stop, *([ramp.begin, ramp.end] if ramp else [])]
        return [moment for moment in moments if moment is not None]

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run has to be known."""
        ends = self.stop_refreshing_at is not None or self.chosen_rule.stop_refreshing_at is not None
        return any(isinstance(each, float) for each in self.moments) or (self.chosen_rule.needs_length and not ends)

    def sparsities_on_ramp(self, remaining: float) -> tuple[float, float]:
        """Forward and backward sparsity where this much is left of the ramp: 1 at its beginning, 0 at its end."""
        ramp = self.chosen_ramp
        if ramp is None or remaining == 0:
            return self.forward_sparsity, self.backward_sparsity
        return (
            self.forward_sparsity + (ramp.forward_sparsity - self.forward_sparsity) * remaining,
            self.backward_sparsity + (ramp.backward_sparsity - self.backward_sparsity) * remaining,
        )

    def sparsities_in(self, override: Mapping[str, float]) -> tuple[float, float]:
        """Forward and backward sparsity of an override, the run's own where it names none."""
        forward = override.get("forward_sparsity", self.forward_sparsity)
        return forward, override.get("backward_sparsity", min(self.backward_sparsity, forward))


def check_sparsities(forward: float, backward: float, where: str = "") -> None:
    """Refuse sparsities out of range: 0 <= backward <= forward < 1."""
    for name, value in (("forward_sparsity", forward), ("backward_sparsity", backward)):
        if not _is_number(value) or not 0 <= value < 1:
            raise TopKastError(f"{where}{name}={value} is out of range: expected a number in [0, 1)")
    if backward > forward:
        raise TopKastError(
            f"{where}backward_sparsity={backward} exceeds forward_sparsity={forward}: the updated set B holds the "
            f"active set A, so expected backward_sparsity <= forward_sparsity"
        )


def check_all_reduce(all_reduce: str) -> None:
    """Refuse an unknown way to reduce gradients; it is the callback's, since in a plain loop DDP is the user's own."""
    known = get_args(AllReduce)
    _check(all_reduce in known, "all_reduce", all_reduce, f"one of {', '.join(known)}")


_A_MOMENT = "a step (int, at least 0), a fraction of the run (float in [0, 1])"


def _is_moment(value: Any) -> bool:
    return _is_number(value) and value >= 0 and (isinstance(value, int) or value <= 1)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _check(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise TopKastError(f"{name}={value!r} is not valid: expected {expected}")
