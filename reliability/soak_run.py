"""One case in a plain loop: the library beside the oracle, which looks at it after every step and every event."""

import copy
import os
import pickle
from math import prod
from pathlib import Path
from typing import Any

import torch
from nouns import nouns
from soak_cases import Case
from soak_oracle import GRADIENT, Oracle, Rules, Violation, check_close, expect, grid_of, naive_counts, spread
from torch import Tensor, nn

from lightning_topkast import TopKast, TopKastError

# Drawn sizes and densities may leave nothing to be sparse; anything else that is refused is a failure.
_FAIR = (
    "too few for one active", "no weight of the model is sparse", "is not a multiple of the", "needs whole rows",
)  # fmt: skip


class Refused(Exception):
    """The library refuses the drawn settings, rightly."""


def stop_of(case: Case) -> int | None:
    stop = case.settings["stop_exploring_at"]
    return round(stop * case.steps) if isinstance(stop, float) else stop


def rules_of(case: Case, topkast: TopKast) -> Rules:
    """What the case asks for; of the library it takes only the names, and the counts once they are checked."""
    settings = case.settings
    shapes = {name: tuple(weight.shape) for name, weight in topkast.weights.items()}
    densities = [1 - settings["forward_sparsity"], 1 - settings["backward_sparsity"]]
    override = settings.get("overrides", {}).get("*")
    if override:
        densities = [1 - override["forward_sparsity"], 1 - override["backward_sparsity"]]
    distribution = "uniform" if override else settings["distribution"]
    asked = [naive_counts(shapes, density, distribution) for density in densities]
    counts = {name: (weight.active_count, weight.updated_count) for name, weight in topkast.weights.items()}
    units = (settings.get("structure", "unstructured"), tuple(settings.get("block", (1, 1))))
    for name, (active, updated) in counts.items():
        expect(1 <= active <= updated <= topkast.weights[name].size, f"{name}: |A| = {active}, |B| = {updated}")
        if ":" in units[0]:
            asked[0][name] = active  # the oracle counts
        block = topkast.weights[name].size / prod(grid_of(shapes[name], units))  # entries, on average
        for count, wanted in ((active, asked[0][name]), (updated, max(asked[1][name], active))):
            off = abs(count - wanted) / block
            expect(off < 0.5 + 0.5 * (block > 1) / block + 1e-6, f"{name}: {count} entries, asked for {wanted}")
    rules = Rules(
        settings["update_every"], settings["delay"], settings["exploration"], stop_of(case),
        settings["penalty"], settings.get("reset_optimizer_state", True), settings["seed"], units,
        counts=counts,
    )  # fmt: skip
    peaks = {n: case.lr / 2 if i % 3 == 2 else case.lr for i, n in enumerate(sorted(parameter_names(topkast)))}
    for name, (active, _) in counts.items():
        rules.strength[name] = float(settings.get("strength", 1e-4))
        if settings.get("shrinkage") is not None:
            rules.strength[name] = settings["shrinkage"] * (active / topkast.weights[name].size) / peaks[name]
    return rules


def parameter_names(topkast: TopKast) -> list[str]:
    return [name for name, _ in topkast.model.named_parameters()]


def build_engine(case: Case, model: nn.Module, **changes: Any) -> TopKast:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        topkast = TopKast(model, **nouns(**(case.settings | changes)))
        topkast.plan(case.steps)
        return topkast
    except TopKastError as error:
        expect(any(reason in str(error) for reason in _FAIR), f"refused: {error}")
        after = model.state_dict()
        expect(all(torch.equal(after[name], value) for name, value in before.items()), "a refusal changed the model")
        raise Refused(str(error)) from None


class Run:
    """The library's run of a case.

    Args:
        case: what was drawn.
        folder: for files.
        watched: whether an oracle goes along.
        other: nonzero for other values of the weights, which a loaded state is to replace.
        changes: to the settings.
    """

    def __init__(self, case: Case, folder: Path, watched: bool = True, other: int = 0, **changes: Any) -> None:
        self.case, self.folder, self.step = case, folder, 0
        self.unaligned = False  # other weights were loaded, which the optimizer's state follows at the next step
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4, enabled=case.scaled)
        self._make(other, **changes)
        self.twin = case.build() if watched else None
        if self.twin is not None:
            values = dict(self.twin.named_parameters())
            self.oracle = Oracle(values, rules_of(case, self.topkast), case.make_optimizer)
            self.check()

    def _make(self, other: int, **changes: Any) -> None:
        self.model = self.case.build(other)
        self.topkast = build_engine(self.case, self.model, **changes)
        self.optimizer = self.case.make_optimizer(dict(self.model.named_parameters()))

    # --- a step ---------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        case, step = self.case, self.step
        for event, storage in case.events.get(step, []):
            self.happen(event, storage)
        if not self.topkast.is_attached:
            self.topkast.attach(self.optimizer)
        skip = case.skips.get(step, "")
        lrs = [group["initial_lr"] * (1 / (1 + step % 4) if case.wandering_lr else 1) for group in self.groups]
        for group, lr in zip(self.groups, lrs, strict=True):
            group["lr"] = lr
        self.optimizer.zero_grad()
        if skip != "no gradient":
            self._backward(self.model, overflow=skip == "overflow")
        if case.scaled and skip != "no gradient":
            self.scaler.unscale_(self.optimizer)
        if skip == "some without":
            next(iter(self.topkast.weights.values())).parameter.grad = None
        if case.clip or step % 2:
            self.topkast.mask_gradients()
            if case.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), case.clip)
        gradients = self._gradients(masked=bool(case.clip or step % 2)) if self.twin is not None else {}
        if self.twin is not None and not skip:
            self._check_gradients(gradients)
        if case.scaled and skip != "no gradient":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif step % 3 == 0:
            self.optimizer.step(lambda: torch.zeros(()))
        else:
            self.optimizer.step()
        self.step += 1
        if self.twin is not None:
            self.unaligned &= not self.oracle.step_with(gradients, lrs, skipped=skip == "overflow")
            self.check()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _backward(self, model: nn.Module, overflow: bool = False, scaled: bool = True) -> None:
        for part in range(self.case.accumulate):
            loss = (torch.tanh(model(self.case.batch(self.step, part))) - 0.3).square().mean()
            loss = loss * float("inf") if overflow else loss
            (self.scaler.scale(loss) if scaled else loss).backward()

    def _gradients(self, masked: bool) -> dict[str, Tensor | None]:
        """The library's, dense; what it has not been asked to mask yet is masked here."""
        found: dict[str, Tensor | None] = {}
        for name, parameter in self.model.named_parameters():
            gradient, sets = parameter.grad, self.oracle.sets.get(name)
            if gradient is not None and sets is not None:
                if gradient.shape != sets[0].shape:
                    gradient = spread(gradient, *sets, self.oracle.rules.units)
                elif not masked:
                    gradient = gradient.masked_fill(~sets[1], 0)
            found[name] = None if gradient is None else gradient.clone()
        return found

    def _check_gradients(self, gradients: dict[str, Tensor | None]) -> None:
        """Compare with those of a dense network that computes with α."""
        assert self.twin is not None
        own = dict(self.twin.named_parameters())
        for name, parameter in own.items():
            alpha = name in self.oracle.sets
            parameter.detach().copy_(self.oracle.alpha(name) if alpha else self.oracle.parameters[name].detach())
        self.twin.zero_grad()
        self._backward(self.twin, scaled=False)
        for name, (_, updated) in self.oracle.sets.items():
            gradient = own[name].grad
            expect((gradient is None) == (gradients[name] is None), f"{name}: one gradient is missing")
            if gradient is not None:
                gradient.mul_(updated)
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.twin.parameters(), self.case.clip)
        if self.case.dtype == "bfloat16" and not self.is_masked:
            return  # other products in bfloat16 may differ by as much as the gradient itself, in attention for one
        for name, mine in gradients.items():
            theirs = own[name].grad
            if mine is not None and theirs is not None:
                check_close(f"{name}: gradient", theirs, mine, GRADIENT[mine.dtype])

    @property
    def is_masked(self) -> bool:
        return all(weight.storage == "masked" for weight in self.topkast.weights.values())

    def check(self) -> None:
        exact = self.is_masked and self.case.settings["penalty"] != "norm"
        expect(self.topkast.is_intact, "the engine finds its model changed")
        self.oracle.compare(self.topkast, None if self.unaligned else self.optimizer, exact, self.model.state_dict())

    # --- what happens between steps -------------------------------------------------------------------------------

    def happen(self, event: str, storage: str) -> None:
        if event == "save":
            self.save(self.folder / "state.pt")
            self.load(self.folder / "state.pt", other=self.step, storage=storage)
        elif event in ("deepcopy", "pickle"):
            parts = (self.model, self.topkast, self.optimizer)
            copied = copy.deepcopy(parts) if event == "deepcopy" else pickle.loads(pickle.dumps(parts))
            self.model, self.topkast, self.optimizer = copied
            self.topkast.attach(self.optimizer)
        elif event == "detach":
            self.topkast.detach()
            self.topkast.attach(self.optimizer)
        elif event == "refresh":
            self.topkast.refresh()
            self.oracle.refresh()
        elif event.startswith("load"):
            packed = all(weight.storage != "masked" for weight in self.topkast.weights.values())
            self._load_weights(dense=packed and event == "load dense")
        else:
            raise Violation(f"no event {event}")
        self.check()

    def _load_weights(self, dense: bool) -> None:
        """Give the model weights of its own sparsity, or dense ones, through its state dict."""
        first = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first[name] = next(n for n, p in self.model.named_parameters() if p is parameter)
        values, generator = {}, torch.Generator().manual_seed(self.step)
        for name in self.topkast.weights:
            alpha = self.model.state_dict()[name].clone()
            random = torch.randn(alpha.shape, generator=generator, dtype=torch.float64).to(alpha.dtype)
            values[name] = random if dense else alpha / 2
        state = {n: values.get(first.get(n, n), v.clone()) for n, v in self.model.state_dict().items()}
        self.model.load_state_dict(state)
        if dense:
            self.oracle.load(values)
            self.unaligned = True
        for name, (active, _) in self.oracle.sets.items() if not dense else ():
            self.oracle.parameters[name].detach()[active] /= 2

    def save(self, path: Path) -> None:
        """Write everything to a file, which is complete or not there."""
        state = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "topkast", "scaler")}
        torch.save(state | {"step": self.step}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path, other: int, **changes: Any) -> None:
        """Go on from a file with new objects; the engine's state before or after the optimizer is attached."""
        state = torch.load(path, weights_only=True)
        self._make(other, **changes)
        self.step, early = state["step"], state["step"] % 2 == 0
        if not early:
            self.topkast.attach(self.optimizer)
        for part in ("model", "optimizer", "topkast", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        if early:
            self.topkast.attach(self.optimizer)

    def everything(self) -> dict[str, Any]:
        """All that a run consists of."""
        parts = {part: copy.deepcopy(getattr(self, part).state_dict()) for part in ("model", "optimizer", "topkast")}
        return parts | {"theta": {name: weight.theta() for name, weight in self.topkast.weights.items()}}


def check_equal(one: Any, other: Any, what: str = "") -> None:
    """Two nested structures are equal bit for bit."""
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        expect(alike, f"{what} differs after resuming")
    elif isinstance(one, dict):
        expect(isinstance(other, dict) and one.keys() == other.keys(), f"{what}: other keys after resuming")
        for key, value in one.items():
            check_equal(value, other[key], f"{what}/{key}")
    elif isinstance(one, list | tuple):
        expect(len(one) == len(other), f"{what}: another length after resuming")
        for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            check_equal(mine, theirs, f"{what}/{i}")
    else:
        expect(one == other, f"{what}: {other} after resuming, {one} without")
