"""The settings of a run: the method's nouns together, and what cannot be combined."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Signature, signature
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_args, overload

from torch import nn

from lightning_topkast.baselines import SET, RigL, Static
from lightning_topkast.checks import check, is_number, plain
from lightning_topkast.errors import TopKastError
from lightning_topkast.gradients import AllReduce, ByName, TopKGradients
from lightning_topkast.method.density import Allocation, Distribution
from lightning_topkast.method.penalty import L2, Penalty
from lightning_topkast.method.rule import Magnitude, Rule
from lightning_topkast.method.schedule import Ramp, Schedule, needs_length
from lightning_topkast.method.structure import Block, NOfM, Structure, Unstructured, structure_of
from lightning_topkast.method.targets import Targets
from lightning_topkast.storage import STORAGES, Masked, Packed

RULES: dict[str, Rule] = {"magnitude": Magnitude(), "set": SET(), "rigl": RigL(), "static": Static()}


class Settings:
    """What `TopKastCallback` and `TopKast` take, checked; a string is short for an object, `schedule` for its defaults.

    Args:
        forward_sparsity: share of each weight's entries that are zero in the forward pass, in [0, 1).
        backward_sparsity: share of entries without a gradient, in [0, forward_sparsity]; 0 with penalty=None is the
            straight-through baseline.
        update_every: short for `Schedule(update_every=...)`.
        include: short for `Targets(include=...)`.
        exclude: short for `Targets(exclude=...)`; both can be given.
        distribution: "uniform" gives every weight the same density, "erk" one in proportion to the sum over the product
            of its sizes (Erdős-Rényi-Kernel). With "global" the weights compete for as many places as "uniform" has,
            with "global_normalized" by scores that are divided by their weight's mean.
        overrides: glob pattern of parameter names → {"forward_sparsity": ..., "backward_sparsity": ...}; later patterns
            win.
        targets: which weights are sparse.
        schedule: when the sets are chosen again.
        ramp: along which the sparsities rise to those of the run, as in gradual pruning (see `Ramp`).
        rule: which entries are chosen: "magnitude" (Top-KAST's own, `Magnitude(exploration=...)`), a baseline
            ("static", "set", "rigl", or `Static()`, `SET()`, `RigL()`), or a `Rule` of your own.
        structure: what the sets consist of: single entries ("unstructured"); blocks of outputs × inputs, chosen by
            their norm ("block", or `Block(outputs, inputs)`); or N of every M consecutive entries for A, with an
            unstructured B ("2:4"). `Unstructured(fan_in=(least, most))` and `Block(fan_in=...)` bound the number in
            each row.
        penalty: the exploration penalty: "l2" (`L2(shrinkage=1e-3)`), `L2(strength=...)`, `L1(...)`, `Norm(...)`, or
            None. "auto" is "l2" with a rule that explores, and None with one that does not.
        powerpropagation: exponent a of θ = φ|φ|^(a-1), with which the optimizer updates φ (Schwarz et al. 2021); 1 is
            off. Gradients are clipped as those of θ, the penalty shrinks θ, weight decay acts on φ.
        storage: how sparse weights are stored. "masked" (`Masked(...)`) simulates sparsity with dense tensors that hold
            zeros: it saves no time and no memory. "packed" (`Packed(...)`) keeps the values of the updated set only and
            multiplies by them. "compact" keeps them too, but multiplies by a dense weight that is made for every pass.
            "auto" packs where that is expected to be faster than dense, and is compact elsewhere.
        all_reduce: what DDP sends of a sparse weight's gradient: all of it ("dense"; of a packed weight that is the
            updated set), the values of the updated set ("sparse"), these and all other gradients as 16-bit numbers
            ("sparse_bf16", "sparse_fp16"), or the largest of these values (`TopKGradients(density=...)`). Unless it is
            "dense", the gradient is zero outside the updated set, also for a gradient scaler. Under Lightning only; in
            a plain loop, register `sparse_all_reduce` or `TopKAllReduce` with DDP.
        seed: seed of everything that is drawn at random.
        weight_curves: whether loggers get the curves and histograms of every single weight, besides those of all.

    Raises:
        TopKastError: a value out of range, or settings that cannot be combined.
    """

    def __init__(
        self,
        forward_sparsity: float,
        backward_sparsity: float,
        *,
        update_every: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        distribution: Distribution = "uniform",
        overrides: dict[str, dict[str, float]] | None = None,
        targets: Targets | None = None,
        schedule: Schedule | None = None,
        ramp: Ramp | None = None,
        rule: Rule | Literal["magnitude", "set", "rigl", "static"] = "magnitude",
        structure: Structure | str = "unstructured",
        penalty: Penalty | Literal["auto", "l2"] | None = "auto",
        powerpropagation: float = 1.0,
        storage: Masked | Packed | Literal["masked", "packed", "compact", "auto"] = "masked",
        all_reduce: AllReduce = "dense",
        seed: int = 0,
        weight_curves: bool = True,
    ) -> None:
        self.targets: Targets = _either(Targets, "targets", targets, include=include, exclude=exclude)
        self.schedule: Schedule = _either(Schedule, "schedule", schedule, update_every=update_every)
        self.ramp = _noun("ramp", ramp, Ramp | None)
        self.rule: Rule = _noun("rule", rule, Rule, RULES)
        self.structure: Structure = structure_of(structure)
        penalties = {"auto": L2() if self.rule.explores else None, "l2": L2()}
        self.penalty: Penalty | None = _noun("penalty", penalty, Penalty | None, penalties)
        self.storage: Masked | Packed = _noun("storage", storage, Masked | Packed, STORAGES)
        by_name = {name: name for name in get_args(ByName)}
        self.all_reduce: AllReduce = _noun("all_reduce", all_reduce, TopKGradients, by_name)
        self.allocation = Allocation(
            forward_sparsity, backward_sparsity, distribution, plain({} if overrides is None else overrides),
            self.structure,
        )  # fmt: skip
        valid = is_number(powerpropagation) and powerpropagation >= 1
        check(valid, "powerpropagation", powerpropagation, "a number of at least 1 (1 turns it off)")
        self.powerpropagation = float(powerpropagation)
        check(is_number(seed) and isinstance(seed, int), "seed", seed, "an int")
        self.seed = seed
        check(isinstance(weight_curves, bool), "weight_curves", weight_curves, "True or False")
        self.weight_curves = weight_curves
        self._check_ramp()
        self._check_rule()
        self._check_structure()
        self._check_storage()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data; a noun is a dict with its class as `name`."""
        allocation = {each.name: getattr(self.allocation, each.name) for each in fields(self.allocation)}
        found = {name: value for name, value in vars(self).items() if name != "allocation"}
        return {name: _as_plain(value) for name, value in (allocation | found).items()}

    @property
    def needs_length(self) -> bool:
        """Whether the length of the run must be known."""
        return needs_length(self.schedule, self.ramp) or (
            self.rule.needs_length and self.schedule.stop_updating_at is None
        )

    # --- what cannot be combined ----------------------------------------------------------------------------------

    def _check_ramp(self) -> None:
        if self.ramp is not None:
            for name in ("forward_sparsity", "backward_sparsity"):
                first, last = getattr(self.ramp, name), getattr(self.allocation, name)
                if first > last:
                    raise TopKastError(f"expected Ramp.{name} to be at most {last}, the run's own, got {first}")
        competing = f"distribution='{self.allocation.distribution}'", self.allocation.competes
        for what, given in (("a ramp", self.ramp), competing):
            if given and (self.storage.name != "masked" or self.schedule.delay):
                raise TopKastError(
                    f"{what} changes the sizes of a weight's sets: expected storage='masked' and delay=0, got "
                    f"storage='{self.storage.name}' and delay={self.schedule.delay}"
                )

    def _check_rule(self) -> None:
        rule, name = self.rule, type(self.rule).__name__
        if not rule.explores:
            for where, (forward, backward) in self.allocation.all_sparsities().items():
                if forward != backward:
                    raise TopKastError(
                        f"{name} updates active entries only: expected backward_sparsity to equal "
                        f"forward_sparsity{where}, got {backward} and {forward}"
                    )
            if self.penalty is not None or self.schedule.stop_exploring_at is not None:
                raise TopKastError(f"{name} does not explore: expected penalty=None and stop_exploring_at=None")
        if rule.needs_gradient and self.storage.name != "masked":
            raise TopKastError(
                f"{name} needs the gradient of every entry, but storage='{self.storage.name}' computes that of the "
                "updated set only: train with storage='masked'"
            )
        if rule.grows_from_zero and self.powerpropagation != 1:
            raise TopKastError(
                f"{name} grows entries from zero, where powerpropagation={self.powerpropagation} leaves no gradient: "
                "they would never learn; leave it at 1"
            )
        if self.schedule.delay and type(rule) is not Magnitude:
            raise TopKastError(
                f"expected delay=0 with {name}, got {self.schedule.delay}: only Magnitude() supports a delay"
            )

    def _check_structure(self) -> None:
        if isinstance(self.structure, Unstructured | Block) and self.structure.fan_in is not None:
            for expected, given in (
                ("distribution='uniform' or 'erk'", not self.allocation.competes),
                ("rule=Magnitude(exploration='magnitude')", self.rule == Magnitude()),
            ):
                if not given:
                    raise TopKastError(f"fan_in={self.structure.fan_in} needs {expected}")
        if not isinstance(self.structure, NOfM):
            return
        density = self.structure.n / self.structure.m
        for where, (forward, _) in self.allocation.all_sparsities().items():
            if abs(1 - forward - density) > 1e-3:
                raise TopKastError(
                    f"{self.structure.n} of every {self.structure.m} entries are active with "
                    f"structure='{self.structure}': expected forward_sparsity={1 - density:.4g}{where}, got {forward}"
                )
        needed = {
            "distribution='uniform'": self.allocation.distribution == "uniform",
            "rule=Magnitude(exploration='magnitude')": self.rule == Magnitude(),
            "ramp=None": self.ramp is None,
        }
        for expected, given in needed.items():
            if not given:
                raise TopKastError(f"structure='{self.structure}' needs {expected}")

    def _check_storage(self) -> None:
        if isinstance(self.storage, Packed):
            known = ("auto", "torch", "triton" if isinstance(self.structure, Block) else "compiled")
            what = f"one of {', '.join(map(repr, known))} with structure='{self.structure}'"
            check(self.storage.kernels in known, "kernels", self.storage.kernels, what)


def _as_plain(value: Any) -> Any:
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Mapping | list | tuple):
        return plain(value)
    own = {each.name: _as_plain(getattr(value, each.name)) for each in fields(value)} if is_dataclass(value) else {}
    return {"name": type(value).__name__} | own


def _either(noun: Any, name: str, given: Any, **shorthands: Any) -> Any:
    """Return a noun, given as itself or by shorthands for some of its fields."""
    short = {field: value for field, value in shorthands.items() if value is not None}
    if given is None:
        return noun(**short)
    if short:
        fields = ", ".join(f"{field}={value!r}" for field, value in short.items())
        raise TopKastError(
            f"expected either {', '.join(short)} or {name}, got both: give {name}={noun.__name__}({fields}, ...)"
        )
    return _noun(name, given, noun)


def _noun(name: str, given: Any, kind: Any, known: dict[str, Any] | None = None) -> Any:
    """Return a noun, given as itself or by its string."""
    if isinstance(given, str) and known is not None and given in known:
        return known[given]
    if not isinstance(given, kind):
        strings = [repr(string) for string in known or ()]
        kinds = [each.__name__ for each in getattr(kind, "__args__", (kind,)) if each is not type(None)]
        nothing = ["None"] if isinstance(None, kind) else []
        check(False, name, given, " or ".join([*strings, f"an object of {' or '.join(kinds)}", *nothing]))
    return given


P = ParamSpec("P")
S = TypeVar("S")


class _TakesSettings(Generic[P]):
    """Decorates an `__init__` that takes `Settings`, so that its callers give what they are made of instead."""

    def __init__(self, settings: Callable[P, Settings]) -> None:
        self._settings = settings

    @overload
    def __call__(self, init: Callable[[S, Settings], None]) -> Callable[Concatenate[S, P], None]: ...

    @overload
    def __call__(
        self, init: Callable[[S, nn.Module, Settings], None]
    ) -> Callable[Concatenate[S, nn.Module, P], None]: ...

    def __call__(self, init: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(init).parameters.values())[:-1]
        taken = list(signature(self._settings).parameters.values())
        settings: Callable[..., Settings] = self._settings
        whole = Signature([*own, *taken])

        @wraps(init)
        def init_with_arguments(*args: Any, **arguments: Any) -> None:
            try:
                given = whole.bind(*args, **arguments).arguments
            except TypeError as error:
                raise TypeError(f"{init.__qualname__}() {error}") from None
            first = [given.pop(each.name) for each in own]
            init(*first, settings(**given))

        init_with_arguments.__signature__ = whole  # type: ignore[attr-defined]
        init_with_arguments.__annotations__ = {each.name: each.annotation for each in (*own[1:], *taken)}
        return init_with_arguments


takes_settings = _TakesSettings(Settings)
