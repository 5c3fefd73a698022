"""The reference, and what it leaves out, to check the library by: blocks, N:M, delays, random exploration, penalties.

Of the library this calls the reference alone: dense θ, sets as bool tensors, sorted Python lists, and the same torch
optimizer over copies of the parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from whole import whole

from lightning_topkast.engine.optimizer_state import SETS
from lightning_topkast.reference import Reference, Sets, draw, largest, mask

# what an entry's optimizer state begins at zero with
STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")
# relative errors that other orders of the same sums may make: in a gradient, and in a step with the same gradient
GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}
STEP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}
FLOOR = {torch.float64: 1e-18, torch.float32: 1e-10, torch.bfloat16: 1e-7}  # below it all is rounding


class Violation(AssertionError):
    """The library did not do what the method says."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(what)


@dataclass
class Rules:
    """What decides a run; the names are those of the library's settings."""

    update_every: int
    delay: int
    exploration: str
    stop: int | None  # step
    penalty: str
    reset_optimizer_state: bool
    seed: int
    units: tuple[str, tuple[int, int]] = ("entry", (1, 1))  # structure, and a block's shape
    strength: dict[str, float] = field(default_factory=dict)  # λ of each weight
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # |A|, |B| of each weight


def naive_counts(shapes: Mapping[str, tuple[int, ...]], density: float, distribution: str) -> dict[str, float]:
    """|set| of every weight, not yet rounded."""
    if distribution == "uniform":
        return {name: density * prod(shape) for name, shape in shapes.items()}
    low, high, total = 0.0, float(max(map(prod, shapes.values()))), density * sum(map(prod, shapes.values()))
    for _ in range(200):  # the scale at which the total is met
        scale = (low + high) / 2
        kept = {name: min(scale * sum(shape), prod(shape)) for name, shape in shapes.items()}
        low, high = (scale, high) if sum(kept.values()) < total else (low, scale)
    return {name: min(high * sum(shape), prod(shape)) for name, shape in shapes.items()}


def grid_of(shape: tuple[int, ...], units: tuple[str, tuple[int, int]]) -> tuple[int, ...]:
    """How many blocks there are in each dimension."""
    sides = list(units[1]) if units[0] == "block" else [1, 1]
    sides = sides[-1:] if len(shape) == 1 else sides + [1] * (len(shape) - 2)
    return tuple(math.ceil(size / side) for size, side in zip(shape, sides, strict=True))


def block_of(shape: tuple[int, ...], units: tuple[str, tuple[int, int]]) -> Tensor:
    """The number of every entry's block, in the weight's shape."""
    sides = list(units[1]) if units[0] == "block" else [1, 1]
    sides = sides[-1:] if len(shape) == 1 else sides + [1] * (len(shape) - 2)
    number = torch.zeros(shape, dtype=torch.int64)
    for dim, (size, side, count) in enumerate(zip(shape, sides, grid_of(shape, units), strict=True)):
        along = (torch.arange(size) // side).view([-1 if d == dim else 1 for d in range(len(shape))])
        number = number * count + along
    return number


def order_of(active: Tensor, updated: Tensor, units: tuple[str, tuple[int, int]]) -> Tensor:
    r"""Flat indices of packed entries: first those of A, then of B\A, block by block, and in flat order in a block."""
    members, blocks = updated.flatten().tolist(), block_of(tuple(active.shape), units).flatten().tolist()
    exploring = (updated & ~active).flatten().tolist()
    order = sorted((i for i, member in enumerate(members) if member), key=lambda i: (exploring[i], blocks[i], i))
    return torch.tensor(order, dtype=torch.int64)


def spread(packed: Tensor, active: Tensor, updated: Tensor, units: tuple[str, tuple[int, int]]) -> Tensor:
    """Dense entries of packed ones."""
    order = order_of(active, updated, units)
    dense = packed.new_zeros(active.numel())
    dense[order] = packed[: len(order)]
    return dense.view(active.shape)


def norms_of(theta: Tensor, block: Tensor) -> list[float]:
    """Of every block, summed in the library's order, first down the outputs: two may differ by rounding alone."""
    wide = theta.to(torch.promote_types(theta.dtype, torch.float32))
    wide = wide.reshape(1, -1) if wide.dim() == 1 else wide
    numbers = block.reshape(wide.shape)
    columns: dict[tuple[int, int], Tensor] = {}
    for row in range(wide.shape[0]):
        for entry, number in enumerate(numbers[row].flatten().tolist()):
            square = wide[row].flatten()[entry].square()
            key = (number, entry)
            columns[key] = columns.get(key, torch.zeros_like(square)) + square
    sums = [wide.new_zeros(()) for _ in range(int(block.max()) + 1)]
    for (number, _), column in sorted(columns.items()):
        sums[number] = sums[number] + column
    return [float(total.sqrt()) for total in sums]


class Oracle(Reference):
    """One run of the method.

    Args:
        values: name → θ of every parameter, the dense ones too; copied.
        rules: of the run; its counts name the sparse weights.
        make_optimizer: name → parameter gives the optimizer.
    """

    def __init__(
        self, values: Mapping[str, Tensor], rules: Rules, make_optimizer: Callable[[dict[str, nn.Parameter]], Optimizer]
    ) -> None:
        self.rules = rules
        counts, strength = rules.counts, rules.strength
        super().__init__(values, counts, strength, make_optimizer, rules.update_every, rules.stop, rules.seed)
        self.pending: list[tuple[int, dict[str, Sets]]] = []
        self.stale = False  # other weights were loaded, which makes the pending sets void
        self._touched = False
        self._outside = {name: ~updated for name, (_, updated) in self.sets.items()}

    # --- what the reference leaves out ----------------------------------------------------------------------------

    def choose_for(self, name: str) -> Sets:
        theta, (count, larger) = self.parameters[name].detach(), self.counts[name]
        if ":" in self.rules.units[0]:
            return self._n_of_m(name, theta, larger)
        if self.rules.units[0] == "block":
            return self._blocks(name, theta)
        if self.rules.exploration == "random":
            return self._at_random(name, theta.abs().double().flatten().tolist(), theta.shape, count, larger)
        return super().choose_for(name)

    def _blocks(self, name: str, theta: Tensor) -> Sets:
        """Whole blocks, by their norms."""
        block = block_of(tuple(theta.shape), self.rules.units)
        grid = grid_of(tuple(theta.shape), self.rules.units)
        count, larger = (round(c * prod(grid) / theta.numel()) for c in self.counts[name])
        norms = norms_of(theta, block)
        if self.rules.exploration == "random":
            sets = self._at_random(name, norms, torch.Size(grid), count, larger)
        else:
            drawn = draw(self.seed, self.step, name, grid)
            both = (largest(norms, count, drawn), largest(norms, larger if self.explores else count, drawn))
            sets = mask(both[0], grid), mask(both[1], grid)
        active, updated = (chosen.flatten()[block] for chosen in sets)
        return active, updated

    def _n_of_m(self, name: str, theta: Tensor, larger: int) -> Sets:
        """The n largest of each m neighbours in a row; B has the next largest wherever they are."""
        n, m = map(int, self.rules.units[0].split(":"))
        magnitudes = theta.abs().double().flatten().tolist()
        drawn = draw(self.seed, self.step, name, theta.shape)
        length = len(magnitudes) // (1 if theta.dim() < 2 else len(theta))
        chosen: list[int] = []
        for row in range(0, len(magnitudes), length):
            for begin in range(row, row + length, m):
                chosen += largest(magnitudes, n, drawn, range(begin, min(begin + m, row + length)))
        rest = set(range(len(magnitudes))) - set(chosen)
        more = largest(magnitudes, larger - len(chosen), drawn, rest) if self.explores else []
        return mask(chosen, theta.shape), mask(chosen + more, theta.shape)

    def _at_random(self, name: str, values: list[float], shape: torch.Size, count: int, larger: int) -> Sets:
        r"""The largest are A; B\A is drawn by lot."""
        tickets = draw(self.seed, self.step, name, shape)
        chosen = largest(values, count, tickets)
        rest = set(range(len(values))) - set(chosen)
        more = largest(tickets, larger - count, among=rest) if self.explores else []
        return mask(chosen, shape), mask(chosen + more, shape)

    def shrink(self, values: Tensor, amount: float) -> Tensor:
        if self.rules.penalty == "l1":
            return values.sign() * (values.abs() - amount).clamp(min=0)
        if self.rules.penalty == "norm":
            length = values.double().square().sum().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
            return (values.double() * (1 - amount / length).clamp(min=0)).to(values.dtype)
        return super().shrink(values, amount)

    def reset_state(self, name: str, members: Tensor) -> None:
        if self.rules.reset_optimizer_state:
            super().reset_state(name, members)

    def step_with(self, gradients: Mapping[str, Tensor | None], lrs: list[float], skipped: bool = False) -> bool:
        """One optimizer step with these gradients, which must be zero outside B; the sets stay.

        Returns:
            whether any sparse weight was updated.
        """
        self._outside = {name: ~updated for name, (_, updated) in self.sets.items()}
        self._touched = False
        if skipped:
            return False
        for name, gradient in gradients.items():
            if gradient is not None and name in self.sets:
                expect(not gradient[self._outside[name]].any(), f"{name}: a gradient outside B")
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        self._touched = self.update(gradients)
        return self._touched

    def refresh(self) -> None:
        self.pending.clear()
        super().refresh()

    def refresh_if_due(self) -> None:
        """What follows a step, once θ is known."""
        if not self._touched:
            return
        self._touched = False
        if self.pending and self.stale:
            self.refresh()
        self.stale = False
        if self.pending and self.step - self.pending[0][0] >= self.rules.delay:
            self.apply(self.pending.pop(0)[1])
        due = self.step % self.update_every == 0 or self.step == self.stop_exploring_at
        if due and self.rules.delay and self.explores:
            self.pending.append((self.step, self.choose()))
        else:
            super().refresh_if_due()

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Other dense weights: all sets by their size; state of what leaves B is lost."""
        sets, fits = dict(self.sets), True
        for name, value in values.items():
            self.parameters[name].detach().copy_(value)
            if not value[~self.sets[name][0]].any():
                continue  # all of it lies in A
            fits = False
            exploring, rules, stop = (
                bool((self.sets[name][1] & ~self.sets[name][0]).any()),
                self.rules,
                self.stop_exploring_at,
            )
            self.rules = replace(rules, exploration="magnitude")
            # zeros are drawn as for the first sets
            step, self.step, self.stop_exploring_at = self.step, 0, None if exploring else 0
            sets[name] = self.choose_for(name)
            self.rules, self.step, self.stop_exploring_at = rules, step, stop
        reset, self.rules.reset_optimizer_state = self.rules.reset_optimizer_state, True
        self.apply(sets)
        self.rules.reset_optimizer_state = reset
        self.refreshes -= 1
        self.stale |= bool(self.pending) and not fits

    # --- the library, compared ------------------------------------------------------------------------------------

    def compare(self, topkast: Any, optimizer: Optimizer | None, exact: bool, values: Mapping[str, Tensor]) -> None:
        """Check every invariant after a step and the refresh that may have followed.

        Args:
            topkast: the library's engine.
            optimizer: the library's run's.
            exact: whether every bit must agree, or sums may have been made in another order; then the library's
                numbers are taken over, so that errors don't add up.
            values: the model's parameters by name; of sparse weights the α that its state dict holds, whole.
        """
        expect(topkast.weights.keys() == self.counts.keys(), f"sparse weights {list(topkast.weights)}")
        thetas = {name: whole(weight.theta()).detach() for name, weight in topkast.weights.items()}
        for name, parameter in self.parameters.items():
            mine, theirs = parameter.detach(), thetas.get(name, values[name].detach())
            self._same(f"{name}: θ", mine, theirs, exact)
            if name in self.sets:
                outside = self._outside[name]
                expect(torch.equal(mine[outside], theirs[outside]), f"{name}: θ on C has changed")
            mine.copy_(theirs)
        self.refresh_if_due()
        counts, expected = (topkast.step_count, topkast.refresh_count), (self.step, self.refreshes)
        expect(counts == expected, f"steps and refreshes {counts}, expected {expected}")
        for name, (active, updated) in self.sets.items():
            weight, (count, larger) = topkast.weights[name], self.counts[name]
            larger = larger if self.explores else count
            one, other = whole(weight.active), whole(weight.updated)
            if self.rules.units[0] != "block":  # of which those at the edges are smaller: compared as sets, below
                expect(int(one.sum()) == count, f"{name}: |A| = {int(one.sum())}, expected {count}")
                expect(int(other.sum()) == larger, f"{name}: |B| = {int(other.sum())}, expected {larger}")
            expect(not (one & ~other).any(), f"{name}: A is not in B")
            expect(torch.equal(one, active), f"{name}: A is not the largest entries, ties by index or drawn")
            expect(torch.equal(other, updated), f"{name}: B is not what was to be chosen")
            expect(int(weight.active_entries) == int(one.sum()), f"{name}: active_entries")
            expect(int(weight.updated_entries) == int(other.sum()), f"{name}: updated_entries")
            expect(torch.equal(values[name].detach(), self.alpha(name)), f"{name}: the model does not compute with α")
        if optimizer is not None:
            self._compare_state(topkast, optimizer, exact)

    def _compare_state(self, topkast: Any, optimizer: Optimizer, exact: bool) -> None:
        names = {id(w.parameter): name for name, w in topkast.weights.items()}
        names |= {id(p): name for name, p in topkast.model.named_parameters() if id(p) not in names}
        for parameter, state in optimizer.state.items():
            name = names[id(parameter)]
            mine = self.optimizer.state[self.parameters[name]]
            keys = state.keys() - {SETS}
            expect(keys == mine.keys(), f"{name}: optimizer state {list(keys)}, expected {list(mine)}")
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                dense = whole(value)
                if name in self.sets and dense.shape != mine[key].shape:
                    dense = spread(dense, *self.sets[name], self.rules.units)
                if name in self.sets and key in STATE and self.rules.reset_optimizer_state:
                    expect(not dense[~self.sets[name][1]].any(), f"{name}: {key} outside B")
                self._same(f"{name}: {key}", mine[key], dense, exact)
                mine[key].copy_(dense)

    @staticmethod
    def _same(what: str, mine: Tensor, theirs: Tensor, exact: bool) -> None:
        expect((mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), f"{what}: {theirs.dtype} {theirs.shape}")
        if exact:
            differ = int((mine != theirs).sum())
            expect(torch.equal(mine, theirs), f"{what}: {differ} of {mine.numel()} entries differ from the oracle's")
        else:
            check_close(what, mine, theirs, STEP[mine.dtype])


def check_close(what: str, mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal but for rounding."""
    if not mine.numel():
        return
    off = (mine.double() - theirs.double()).abs()
    allowed = tolerance * (mine.double().abs() + mine.double().abs().max())
    expect(bool((off <= allowed + FLOOR[mine.dtype]).all()), f"{what}: off by {float(off.max()):.3g} from the oracle's")
