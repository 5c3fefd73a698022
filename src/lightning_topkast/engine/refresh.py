"""The refresh: choosing the sets of weights again, at once or in the background."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.distributed import check_ranks_agree, mark_background, to_local
from lightning_topkast.engine.choose import Choice, choose
from lightning_topkast.errors import TopKastError
from lightning_topkast.method.density import SetSizes, normalized
from lightning_topkast.method.rule import Rule
from lightning_topkast.method.selection import ACTIVE, EXPLORING
from lightning_topkast.weights import EntryState, SparseWeight
from lightning_topkast.weights.state import holds_values

# One thread for all weights: selection is limited by memory bandwidth, and training continues meanwhile.
_background: ThreadPoolExecutor


def _begin_background() -> None:
    global _background
    _background = ThreadPoolExecutor(1, thread_name_prefix="topkast-refresh", initializer=mark_background)


_begin_background()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_background)  # a forked process has no threads of its parent


class Selection:
    """The next sets of some weights, chosen in the background from the present values.

    Args:
        weights: the weights whose sets are chosen.
        choice: settings, step and set sizes of this refresh.
    """

    def __init__(self, weights: Sequence[SparseWeight], choice: Choice) -> None:
        self.step = choice.step
        self._loads = {weight: weight.load_count for weight in weights}
        snapshots = [(weight, weight.snapshot()) for weight in weights]

        def work() -> dict[str, Tensor]:
            chosen: dict[str, Tensor] = {}
            for weight, scores in snapshots:
                chosen |= choose([weight], choice, [scores()])
            for weight in weights:
                weight.prepare(chosen[weight.name])
            return chosen

        self._unfinished: Callable[[], dict[str, Tensor]] | None
        self._process, self._unfinished = os.getpid(), work  # for a process forked meanwhile, which nobody works for
        future = _background.submit(work)
        self._chosen: dict[str, Tensor] | Future[dict[str, Tensor]] = future
        future.add_done_callback(self._finish)

    def result(self) -> dict[str, Tensor]:
        """Return weight name → tiers, after waiting for them if necessary.

        Raises:
            NonFiniteWeightError: a weight held NaN or infinity.
        """
        if isinstance(self._chosen, Future):
            work = self._unfinished
            forked = work is not None and self._process != os.getpid()
            self._chosen = work() if forked else self._chosen.result()  # type: ignore[misc]
            self._unfinished = None
        return self._chosen

    def _finish(self, future: "Future[dict[str, Tensor]]") -> None:
        self._unfinished = None  # and with it the values

    def concerns(self, weights: Iterable[SparseWeight]) -> bool:
        """Return whether the selection includes any of these weights."""
        return any(weight in self._loads for weight in weights)

    @property
    def is_valid(self) -> bool:
        """Whether no other weights were loaded since the sets were chosen."""
        return all(weight.load_count == loads for weight, loads in self._loads.items())

    def __getstate__(self) -> dict[str, Any]:
        chosen = self.result()
        return self.__dict__ | {"_chosen": chosen}

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Return the step and the sets: tensors and primitives only; see `SparseWeight.state_dict`."""
        chosen = self.result()
        tiers = {weight.name: weight.sharding.to_save(chosen[weight.name], gathered) for weight in self._loads}
        return {"step": self.step, "tiers": tiers, "valid": self.is_valid}

    @classmethod
    def from_state(cls, state: Any, weights: Mapping[str, SparseWeight]) -> "Selection":
        """Return a selection that was saved before it took effect.

        Raises:
            TopKastError: the selection does not fit the weights.
        """
        state = state if isinstance(state, dict) else {}
        step, tiers, valid = state.get("step"), state.get("tiers"), state.get("valid", True)
        named = isinstance(tiers, dict) and bool(tiers) and not tiers.keys() - weights.keys()
        timed = isinstance(step, int) and step >= 0 and isinstance(valid, bool)
        if not isinstance(tiers, dict) or not named or not timed:
            raise TopKastError("the saved Top-KAST state is damaged: its next sets lack a step or name other weights")
        parts: dict[str, Tensor] = {}
        for name, chosen in tiers.items():
            weight = weights[name]
            counts = [weight.updated_count - weight.active_count, weight.active_count]
            fits = isinstance(chosen, Tensor) and (chosen.dtype, chosen.shape) == (torch.uint8, weight.shape)
            fits = fits and holds_values(to_local(chosen))
            if fits:
                part = parts[name] = weight.sharding.to_local(chosen).contiguous()
                counted = [torch.count_nonzero(each) for each in (part > ACTIVE, part == EXPLORING, part == ACTIVE)]
                unknown, *sizes = weight.sharding.sum(torch.stack(counted)).tolist()
                fits = not unknown and weight.structure.are_whole(part, weight.sharding)
            if not fits or (sizes != counts and not weight.sizes_change):
                raise TopKastError(f"the saved Top-KAST state is damaged: the next sets of '{name}' do not fit it")
        selection = cls.__new__(cls)
        selection.step, selection._chosen = step, parts
        selection._loads = {weights[name]: weights[name].load_count if valid else -1 for name in tiers}
        return selection


class Refresher:
    """Choose the sets of weights again when the schedule says so, at once or in the background.

    Args:
        sizes: sizes of the sets over the run.
        rule: chooses the entries of the sets.
        seed: of the run.
        state_of: returns the optimizer's state of a weight, which is moved with the sets.
    """

    def __init__(
        self, sizes: SetSizes, rule: Rule, seed: int, state_of: Callable[[SparseWeight], list[EntryState]]
    ) -> None:
        self.sizes = sizes
        # weight name → sizes over the steps of its own optimizer, where the run has shown how many it takes
        self.own_sizes: dict[str, SetSizes] = {}
        self.count = 0
        self.on_refresh: Callable[[], None] | None = None  # called after every refresh
        self.selections: list[Selection] = []  # chosen, to take effect `delay` steps later
        self._rule = rule
        self._seed = seed
        self._state_of = state_of

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has no callback."""
        return self.__dict__ | {"on_refresh": None}

    def plan(self, sizes: SetSizes, keeps_own: bool) -> None:
        """Plan the run anew.

        Args:
            sizes: of the sets over the run.
            keeps_own: whether moments that an optimizer has of its own stay.
        """
        own = self.own_sizes if keeps_own else {}
        self.sizes = sizes
        self.own_sizes = {name: sizes.with_moments(each.timeline.moments) for name, each in own.items()}

    def replan(self, weights: Sequence[SparseWeight], step: int, total_steps: int) -> None:
        """Correct the length of the run in steps of the optimizer of these weights, which has taken `step` steps."""
        sizes = self.sizes_of(weights).replanned(total_steps, step)
        self.own_sizes |= {weight.name: sizes for weight in weights}

    def sizes_of(self, weights: Sequence[SparseWeight]) -> SetSizes:
        """Return the sizes of the sets of one optimizer's weights."""
        return self.own_sizes.get(weights[0].name, self.sizes) if weights else self.sizes

    def fits(self, weights: Sequence[SparseWeight], step: int, all_trained: bool) -> bool:
        """Return whether these weights explore if and only if the schedule says so.

        Args:
            weights: whose sets have sizes of one plan.
            step: the number of steps taken with their optimizer.
            all_trained: whether it is known that none of them was left out by it.
        """
        sizes = self.sizes_of(weights)
        # chosen when they were due, or by a refresh by hand or under another schedule since
        chosen = [sizes.at(each) for each in (sizes.timeline.last_choice(step), step)]
        can_explore = [weight for weight in weights if weight.can_explore]
        varying = [weight for weight in can_explore if weight.sizes_change]
        for counts in chosen:
            asked = {weight: counts[weight.name][1] > counts[weight.name][0] for weight in can_explore}
            fitting = [weight.is_exploring == asked[weight] for weight in can_explore if not weight.sizes_change]
            if varying:
                fitting.append(any(weight.is_exploring for weight in varying) == any(asked[each] for each in varying))
            if all(fitting) or (not all_trained and any(fitting)):
                return True
        return False

    def join(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Refresh weights that an optimizer was given late, after `step` steps of it, if they may be behind."""
        if self.sizes_of(weights).timeline.ramp is not None or not self.fits(weights, step, all_trained=True):
            self.refresh((weights, step))

    def after_step(self, weights: Sequence[SparseWeight], step: int) -> None:
        """Refresh these weights, or start or apply a selection, if one is due after `step` optimizer steps."""
        sizes = self.sizes_of(weights)
        for begun in [selection for selection in self.selections if selection.concerns(weights)]:
            if not begun.is_valid:  # other weights were loaded since
                self.selections.remove(begun)
                self.refresh((weights, step))
            elif step - begun.step >= sizes.schedule.delay:
                self.selections.remove(begun)
                self._apply(weights, begun.result())
        if sizes.timeline.refreshes_after(step):
            if sizes.schedule.delay and sizes.timeline.explores_at(step):
                self.selections.append(Selection(weights, self._choice(weights, step)))
            else:  # exploration stops now, without delay
                self.selections = [selection for selection in self.selections if not selection.concerns(weights)]
                self.refresh((weights, step))

    def refresh(self, *groups: tuple[Sequence[SparseWeight], int]) -> None:
        """Choose the sets of weights now; all are chosen before any is changed.

        Args:
            groups: weights whose sets have sizes of one plan, and the number of steps taken with their optimizer.

        Raises:
            NonFiniteWeightError: a weight holds NaN or infinity; no weight's sets were changed.
            TopKastError: the ranks disagree.
        """
        chosen: dict[str, Tensor] = {}
        for weights, step in groups:
            chosen |= self._choose(weights, self._choice(weights, step))
        self._apply([weight for weights, _ in groups for weight in weights], chosen)

    def begin(self, weights: Sequence[SparseWeight]) -> None:
        """Choose the first sets, as `refresh` does, but without counting a refresh."""
        # the progress is 0 even if the length of the run is not known yet, as with a Trainer
        self._apply(weights, self._choose(weights, replace(self._choice(weights, 0), is_first=True, progress=0.0)))
        self.count = 0

    def _choice(self, weights: Sequence[SparseWeight], step: int) -> Choice:
        sizes = self.sizes_of(weights)
        structure, progress = sizes.allocation.structure, sizes.timeline.progress(step)
        return Choice(self._rule, structure, self._seed, step, sizes.at(step), progress)

    def looks_at_gradients(self, weights: Sequence[SparseWeight], steps: int) -> bool:
        """Return whether the next sets depend on the gradients of the step after `steps` steps, also outside B."""
        return self._rule.needs_gradient and self.sizes_of(weights).timeline.refreshes_after(steps + 1)

    def _choose(self, weights: Sequence[SparseWeight], choice: Choice) -> dict[str, Tensor]:
        alone, together = list(weights), []
        allocation, scores = self.sizes.allocation, None
        if allocation.competes:
            overridden = allocation.overridden(self.sizes.shapes)
            alone = [weight for weight in weights if weight.name in overridden]
            together = [weight for weight in weights if weight.name not in overridden]
        if allocation.distribution == "global_normalized":
            scores = [normalized(weight.scores()) for weight in together]
        chosen = choose(together, replace(choice, compete=True), scores) if together else {}
        for weight in alone:
            chosen |= choose([weight], choice)
        return chosen

    @torch.no_grad()
    def _apply(self, weights: Sequence[SparseWeight], chosen: Mapping[str, Tensor]) -> None:
        changed = [weight for weight in weights if weight.name in chosen]
        names = [weight.name for weight in changed]
        compared = [weight.compared(chosen[weight.name]) for weight in changed]
        check_ranks_agree(names, [tensor for tensor, _ in compared], [sharding for _, sharding in compared])
        states = [self._state_of(weight) for weight in changed]
        for weight, state in zip(changed, states, strict=True):
            weight.apply(chosen[weight.name], state)
        self.count += 1
        if self.on_refresh is not None:
            self.on_refresh()
