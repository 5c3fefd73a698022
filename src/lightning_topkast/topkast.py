"""Top-KAST for the weights of a model (Jayakumar et al. 2020); depends on PyTorch only, not on Lightning."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_topkast.engine.attached import Attached
from lightning_topkast.engine.captured_step import CapturedStep
from lightning_topkast.engine.held import check_trained, follow, reshard, without_parameter
from lightning_topkast.engine.install import check_targets, draw, install, make_weights, release
from lightning_topkast.engine.notices import Notices
from lightning_topkast.engine.refresh import Refresher, Selection
from lightning_topkast.engine.state import STATE_VERSION, SavedState
from lightning_topkast.engine.step_hooks import StepHooks
from lightning_topkast.engine.strength import Strengths
from lightning_topkast.engine.summary import Summary, summarize, warn_if_little
from lightning_topkast.engine.watch import watch_module
from lightning_topkast.engine.writes import ForeignWrites
from lightning_topkast.errors import TopKastError
from lightning_topkast.gradients import TopKGradients
from lightning_topkast.layers import join_products, packed_weights
from lightning_topkast.method.density import SetSizes
from lightning_topkast.method.schedule import Timeline, in_words, moments
from lightning_topkast.method.targets import FROZEN, Target, find_targets
from lightning_topkast.settings import Settings, takes_settings
from lightning_topkast.storage import Masked
from lightning_topkast.weights import EntryState, MaskedWeight, SparseWeight, Traits

_engines: WeakSet["TopKast"] = WeakSet()  # that no later one has released


class TopKast:
    """Keep a model sparse while any PyTorch optimizer trains it.

    The constructor chooses the weights and makes them sparse; those of an earlier `TopKast` begin with its θ, and it is
    released. After `attach`, every step of the optimizer updates only B and applies the exploration penalty, and every
    `update_every` steps A and B are chosen again:

        topkast = TopKast(model, forward_sparsity=0.9, backward_sparsity=0.8).attach(optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    Args:
        model: the model; its parameters stay its own and are α (zero outside A) between steps.
        settings: given as the arguments of `Settings`; `TopKastCallback` takes the same.

    Raises:
        TopKastError: a setting is out of range, a pattern matches nothing, there is nothing to make sparse, a weight is
            too small for one active entry, or sharded weights are to be packed.
        NonFiniteWeightError: a weight holds NaN or infinity.
    """

    @takes_settings
    def __init__(self, model: nn.Module, settings: Settings) -> None:
        all_reduce = settings.all_reduce
        if all_reduce != "dense":
            hook = "sparse_all_reduce(topkast)"
            if isinstance(all_reduce, TopKGradients):
                hook = f"TopKAllReduce(topkast, gradients={all_reduce!r}).hook"
            raise TopKastError(
                f"all_reduce={all_reduce!r} needs TopKastCallback; with your own DDP, use all_reduce='dense' and call "
                f"ddp.register_comm_hook(None, {hook})"
            )
        self._begin(model, settings)

    @classmethod
    def of(cls, model: nn.Module, settings: Settings, taken: Collection[str] = ()) -> "TopKast":
        """Make an engine from settings that are already checked.

        Args:
            model: the model.
            settings: of the run; the caller is responsible for the all-reduce of DDP.
            taken: names of weights that belong to another engine.

        Raises:
            TopKastError: as in the constructor, or a weight is in `taken`.
        """
        topkast = cls.__new__(cls)
        topkast._begin(model, settings, taken)
        return topkast

    def _begin(self, model: nn.Module, settings: Settings, taken: Collection[str] = ()) -> None:
        self.model = model
        self.settings = settings
        self._watches: list[RemovableHandle] = []
        self._writes = ForeignWrites()
        self._notices = Notices(settings)
        self._zeros: dict[str, tuple[int, int]] = {}  # for the summary

        drawn = draw(model, settings)
        reshard(model)
        self._targets = find_targets(model, settings.targets)
        warn_if_little(self._targets, settings.targets)
        sparse = [target for target in self._targets if target.sparse]
        check_targets(sparse, settings, taken)
        shapes = {target.name: target.shape for target in sparse}
        stacks = frozenset(target.name for target in sparse if target.is_stack)
        sizes = SetSizes(settings.allocation, settings.schedule, settings.ramp, shapes, stacks)
        if self._take_over_earlier(sparse):
            self._targets = find_targets(model, settings.targets)
            sparse = [target for target in self._targets if target.sparse]
        for target in sparse:
            target.parameter = drawn.get(target.parameter, target.parameter)
        self._refresher = Refresher(sizes, settings.rule, settings.seed, self._state_of)
        self._attached = self._unattached()
        resets_state = not isinstance(settings.storage, Masked) or settings.storage.reset_optimizer_state
        traits = Traits(
            settings.structure, settings.penalty, settings.rule.clears_dropped, sizes.changes_size,
            settings.powerpropagation, settings.seed, resets_state,
        )  # fmt: skip
        self._weights = make_weights(sparse, sizes.final, settings.storage, traits)
        self._by_parameter: dict[Tensor, SparseWeight] = {}
        self._strengths = Strengths(settings.penalty, self._weights)
        self._set_strength()
        if not settings.needs_length:
            self._refresher.sizes = sizes.planned(None)
        self._choose_first()
        for target in sparse:
            install(target, self._weights[target.name])
        join_products(model)
        self._watch_modules()
        _engines.add(self)

    # --- properties -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, SparseWeight]:
        """The sparse weights by parameter name."""
        return MappingProxyType(self._weights)

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that hold the sparse weights."""
        return [module for target in self._targets if target.name in self._weights for module, _ in target.owners]

    @property
    def step_count(self) -> int:
        """Number of optimizer steps taken; with several optimizers, the largest of their counts."""
        return max(self.optimizer_steps, default=0)

    @property
    def refresh_count(self) -> int:
        """Number of refreshes; with several optimizers, each refresh counts separately."""
        return self._refresher.count

    @property
    def timeline(self) -> Timeline:
        """The steps at which the sets are chosen again and at which exploration stops.

        With several optimizers whose lengths only the run shows, those of the one that has taken most steps.
        """
        most = max(self._attached, key=lambda hooks: hooks.steps, default=None)
        return self._refresher.sizes_of(most.weights if most else []).timeline

    @property
    def optimizer_steps(self) -> list[int]:
        """Number of steps taken with each attached optimizer."""
        return self._attached.steps

    @property
    def unfinished(self) -> list[str]:
        """What the schedule asks for and the steps taken so far have not reached, in words."""
        found = []
        schedule, asked = self.settings.schedule, self.settings.ramp
        for weights, step in self._groups:
            timeline = self._refresher.sizes_of(weights).timeline
            stop, ramp = timeline.schedule.stop_exploring_at, timeline.ramp
            if asked is not None and ramp is not None and step < ramp.end:
                found.append(f"the ramp was to end at {in_words(asked.end)}, and has not after {step} steps")
            if stop is not None and step < stop and any(weight.is_exploring for weight in weights):
                when = in_words(schedule.stop_exploring_at)
                found.append(f"exploration was to stop at {when}, and has not after {step} steps")
        return found

    def too_short(self, steps: int | float) -> str | None:
        """Return in words that a run ends before its first refresh; None if it does not, or is to have none.

        Args:
            steps: its length in optimizer steps; -1 or infinity if it has no end.
        """
        first = self.timeline.first_refresh
        if self.refresh_count or not self.settings.rule.changes_sets or first is None or not 0 < steps < first:
            return None
        return (
            f"the sets are never chosen again in {steps} steps, since they are for the first time after {first}: this "
            "trains a static mask. Choose a smaller update_every, or train longer"
        )

    @property
    def exploring(self) -> bool:
        """Whether B is larger than A at the next step."""
        return self.timeline.explores_at(self.step_count)

    @property
    def unattached(self) -> list[str]:
        """Names of sparse weights that no attached optimizer holds."""
        return self._attached.left_out(self._weights)

    @property
    def frozen(self) -> list[str]:
        """Names of sparse weights that require no gradient."""
        self._reshard()
        return [name for name, weight in self._weights.items() if not weight.parameter.requires_grad]

    @property
    def is_attached(self) -> bool:
        """Whether this engine is attached to an optimizer."""
        return len(self._attached) > 0

    @property
    def hooked_steps(self) -> int:
        """Number of steps of attached optimizers that the hooks have seen, with those that were skipped."""
        return sum(hooks.seen for hooks in self._attached)

    @property
    def was_written(self) -> bool:
        """Whether other code has written to a weight since the last step."""
        return any(weight.was_written for weight in self._weights.values())

    @property
    def needs_gradients(self) -> bool:
        """Whether the next sets depend on the next step's gradients, including those outside B (RigL)."""
        return any(hooks.needs_gradients for hooks in self._attached)

    @property
    def _gone(self) -> list[str]:
        """Names of the sparse weights whose parameters the model no longer holds."""
        self._reshard()
        return without_parameter(self.model, self._weights)

    def _reshard(self) -> None:
        """Reshard the model under FSDP2, and go on with the parameters that it has made of packed ones."""
        reshard(self.model)
        follow(self._targets, self._weights)
        self._index()

    def _index(self) -> None:
        """Index the weights by their parameters, for hooks too, which share the index."""
        self._by_parameter.clear()
        self._by_parameter.update({weight.parameter: weight for weight in self._weights.values()})

    def check_held(self) -> None:
        """Refuse to go on if the model no longer holds a sparse weight's parameter.

        Raises:
            TopKastError: other code has replaced a parameter or its layer.
        """
        if gone := self._gone:
            raise TopKastError(
                f"the model no longer holds the parameters of the sparse weights {', '.join(gone[:5])}, since other "
                "code has replaced them or their layers during training; write new values into the parameters "
                "instead, or replace layers between two fits"
            )

    @property
    def is_released(self) -> bool:
        """Whether a later engine, or `release`, has taken the weights from this one."""
        return self not in _engines

    @property
    def is_intact(self) -> bool:
        """Whether the model still holds these parameters, as sparse as A; a collective if any of them is sharded."""
        return (
            not self.is_released
            and not self._gone
            and all(
                weight.is_sparse or int(weight.nonzero_entries) <= int(weight.active_entries)
                for weight in self._weights.values()
            )
        )

    def summary(self) -> Summary:
        """Return a table of all parameters: exact sizes of A and B, or why a parameter is dense."""
        optimizers = self._attached.optimizers
        return summarize(self._targets, self._weights, self.timeline, self.settings, optimizers, self._zeros)

    def penalty(self) -> Tensor:
        """Return the exploration penalty of all weights, a scalar tensor; a collective if any weight is sharded."""
        return torch.stack([weight.penalty().float() for weight in self._weights.values()]).sum()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is attached to no optimizer, even if the optimizer is copied with it."""
        orders = {name: order for hooks in self._attached for name, order in hooks.orders.items()}
        return self.__dict__ | {"_attached": (self.optimizer_steps, orders), "_watches": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attached = self._unattached(*state["_attached"])
        _engines.add(self)
        self._watch_modules()

    # --- the method -----------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer, total_steps: int | float | None = None) -> "TopKast":
        """Act on every step of `optimizers` from now on.

        Args:
            optimizers: those that train the sparse weights.
            total_steps: length of the run in optimizer steps; required if a setting is a fraction of it.

        Raises:
            TopKastError: there is no optimizer; an optimizer is known not to train sparse weights (see
                `register_optimizer`), holds none of them, is already attached, has no learning rate, or has one at
                which the penalty overshoots zero; or a setting is a fraction of a run of unknown length.
        """
        if not optimizers:
            raise TopKastError("attach() expected at least one optimizer, got none; pass those that train the model")
        if self.is_released:
            raise TopKastError(
                "this TopKast was released, or a later one has taken over its weights; attach that one, or make another"
            )
        self._reshard()
        self.accept_writes()
        if total_steps is not None or not self._refresher.sizes.is_planned:
            self.plan(total_steps)
        before = self._attached.add(optimizers, self._by_parameter)
        try:
            self._set_strength()
        except TopKastError:
            self._attached.take_back(before)
            raise
        self._watch_modules()
        for weight in self._weights.values():
            weight.is_trained = weight.was_trained = True
            weight.match_layout()
        self._attached.begin(before)
        self._look_for_zeros()
        self._follow_schedule()
        if total_steps is not None and (problem := self.too_short(total_steps)):
            warnings.warn(problem, stacklevel=2)
        return self

    def plan(self, total_steps: int | float | None) -> None:
        """Set the length of the run in optimizer steps; settings may be fractions of it.

        Raises:
            TopKastError: a setting is a fraction or the rule needs the length, and the length is not known.
        """
        sizes = self._refresher.sizes.planned(total_steps)
        if self.settings.rule.needs_length and sizes.timeline.horizon is None:
            raise TopKastError(
                f"{type(self.settings.rule).__name__} depends on the progress of the run, but its length is not known; "
                "give stop_updating_at, or limit the run (Trainer: max_steps or max_epochs; attach: total_steps)"
            )
        self._refresher.plan(sizes, keeps_own=self._attached.awaits_optimizers)
        if self.step_count == self.refresh_count == 0 and not self._sets_fit_schedule:
            self._choose_first()  # exploration stops at a fraction that is less than a step

    def replan(self, total_steps: Sequence[int | None]) -> None:
        """Correct the length of a run that is under way, in steps of each attached optimizer.

        Moments that are fractions of the run move with it. One that has passed stays, and one that would have passed
        already takes effect after the next step.

        Args:
            total_steps: for each attached optimizer, in order; None leaves its plan as it is.
        """
        for hooks, total in zip(self._attached, total_steps, strict=True):
            if total is not None:
                self._refresher.replan(hooks.weights, hooks.steps, total)

    def detach(self) -> None:
        """Remove the hooks from the optimizers; the model stays sparse as it is, and the step count is kept."""
        self.recover()
        self._attached.end()
        for weight in self._weights.values():
            weight.is_trained = False

    def release(self) -> None:
        """Put every stored θ back into the model, which is dense afterwards; this engine cannot be used again.

        Raises:
            TopKastError: a weight is packed and sharded by FSDP2; nothing has changed.
        """
        self._reshard()
        for weight in self._weights.values():
            weight.check_release()
        self._let_go()
        for target in self._targets:
            if target.name in self._weights:
                release(target, self._weights[target.name])

    def _let_go(self) -> None:
        """Leave the model as it is, for good."""
        self.detach()
        self._attached.end_watching()
        for watch in self._watches:
            watch.remove()
        self._watches = []
        _engines.discard(self)

    def _take_over_earlier(self, sparse: Sequence[Target]) -> bool:
        """Release the engines that kept some of these parameters sparse before; return whether there were any."""
        wanted = {id(target.parameter) for target in sparse}
        names = {target.name for target in sparse}
        earlier = [e for e in _engines if any(id(weight.parameter) in wanted for weight in e._weights.values())]
        for engine in earlier:
            engine.recover()
            engine.accept_writes([weight for weight in engine._weights.values() if weight.was_loaded])
            if not engine.is_intact:
                warnings.warn(
                    "an earlier TopKast kept these weights sparse, and other code has written other values into them "
                    "since, to which its θ does not belong: this one begins with what the model holds now",
                    stacklevel=5,
                )
                engine._let_go()
                continue
            engine.release()
            others = {name: weight for name, weight in engine._weights.items() if name not in names}
            if left := [name for name, weight in others.items() if weight.parameter.requires_grad]:
                warnings.warn(
                    f"an earlier TopKast kept the weights {', '.join(left[:5])} sparse, and this one does not: they "
                    "become dense; include them too, or freeze them (requires_grad_(False))",
                    stacklevel=5,
                )
        packed = packed_weights(self.model)
        for target in sparse:
            if target.name in packed:  # by an engine that is gone
                release(target, packed[target.name])
        return bool(earlier or packed)

    def exclude(self, names: Collection[str]) -> None:
        """Make the named weights dense again; they stay dense.

        Raises:
            TopKastError: one of them is packed and sharded by FSDP2; nothing has changed.
        """
        self._reshard()
        for name in self._weights.keys() & set(names):
            self._weights[name].check_release()
        for target in self._targets:
            if target.name in names:
                release(target, self._weights.pop(target.name))
                target.reason = FROZEN
        self._index()

    def restart(self) -> None:
        """Start a new run with the same weights: count steps from 0, and explore again if exploration had stopped."""
        self._attached.restart()
        self._strengths.forget()  # the learning rates of this run determine λ
        self._set_strength()
        self._refresher.selections.clear()
        self._refresher.own_sizes.clear()
        if self.settings.ramp is not None and self.refresh_count:
            self.refresh()  # to the densities at the start of the ramp
        self._follow_schedule()

    def on_refresh(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` after every refresh; None removes it."""
        self._refresher.on_refresh = callback

    def mask_gradients(self) -> None:
        """Zero the gradients outside B, so that clipping and logged norms see what the optimizer uses.

        Every step does this by itself; call it only to clip or log gradients in your own loop.
        """
        for hooks in self._attached:
            hooks.mask_gradients()

    def prepare_step(self, optimizer: Optimizer) -> None:
        """Mask the gradients of the next step of `optimizer`, so that the step itself need not mask them."""
        self._attached.prepare_step(optimizer)

    def capture(self, step: Callable[[], Any]) -> CapturedStep:
        """Return a training step that is captured in a CUDA graph, and replayed with refreshes between replays.

        Args:
            step: takes one training step, with everything from `zero_grad` to the steps of all attached optimizers, and
                returns what the caller wants to know, such as the loss. It reads its batch from the same tensors at
                every call, and no value of the device on the host.

        Raises:
            TopKastError: this engine is not attached to an optimizer.
        """
        if not self.is_attached:
            raise TopKastError("capture() expected an engine that is attached to its optimizers; call attach() first")
        return CapturedStep(self._attached, step)

    def refresh(self) -> None:
        """Choose A and B of every weight again, now.

        Raises:
            NonFiniteWeightError: a weight holds NaN or infinity; no weight's sets were changed.
            TopKastError: the ranks disagree.
        """
        self._reshard()
        self.recover()
        self.accept_writes()
        self._attached.fit_state()
        self._refresher.selections.clear()
        self._refresher.refresh(*self._groups)
        self._attached.leave_state()

    def recover(self) -> None:
        """Make every parameter α again after an interrupted step or refresh; otherwise do nothing."""
        for weight in self._weights.values():
            weight.recover()
        self._attached.recover()

    def restore_sparsity(self) -> None:
        """Make every parameter zero outside A again after other code wrote to it; θ outside A is kept."""
        self._reshard()
        for weight in self._weights.values():
            weight.restore_sparsity()

    @torch.no_grad()
    def accept_writes(
        self, weights: Iterable[SparseWeight] | None = None, closely: bool = False, averaged: bool = False
    ) -> None:
        """Accept what other code wrote to the weights since the last step, so that the network is sparse again.

        Weights that are sparse, or that `load_state_dict` has loaded, become the model's; see
        `SparseWeight.take_over`. Of all others the entries outside A are zeroed, with a warning. Every step does this
        by itself. It takes microseconds per weight that nobody wrote to.

        Args:
            weights: those to look at; None: all.
            closely: read all values, which finds also what was written through `parameter.data`.
            averaged: whether an average that is kept sparse may have been copied into the model, for which no warning
                is due.

        Raises:
            NonFiniteWeightError: a weight that was loaded holds NaN or infinity.
        """
        self._writes.accept(self._weights.values() if weights is None else weights, closely, averaged)

    def warn_if_dense(self) -> None:
        """Warn if the weights with which the network has just computed are not zero outside A, since they were written.

        Call it after a forward pass; `TopKastCallback` does. A perturbation that is undone before the optimizer's step,
        such as SAM's, is not noticed otherwise.
        """
        self._writes.warn_if_dense(self._weights.values())

    def _watch_modules(self) -> None:
        """Notice weights that are loaded, and give only sparse ones to be saved."""
        for target in self._targets if not self._watches else ():
            weight = self._weights.get(target.name)
            if isinstance(weight, MaskedWeight):
                self._watches += watch_module(weight, target.owners, self.accept_writes)

    def _unattached(self, steps: Sequence[int] = (), orders: Mapping[str, int] = MappingProxyType({})) -> Attached:
        attached = Attached(self._after_step, self._refresher.looks_at_gradients, self._before_step)
        attached.steps_before, attached.orders = list(steps), dict(orders)
        return attached

    @property
    def _groups(self) -> list[tuple[list[SparseWeight], int]]:
        """The weights by optimizer, and the number of steps that each has taken."""
        if len(self._attached) < 2 and not self._refresher.own_sizes:
            return [(list(self._weights.values()), self.step_count)]
        groups = [(hooks.weights, hooks.steps) for hooks in self._attached]
        rest = [self._weights[name] for name in self.unattached]
        return [*groups, (rest, self.step_count)] if rest else groups

    def _follow_schedule(self) -> None:
        """Refresh if the sets explore and the schedule says they should not, or the reverse."""
        # which steps count for which weights is not known before optimizers of their own are attached
        is_known = self.is_attached or not self._refresher.own_sizes
        if is_known and self._refresher.sizes.is_planned and not self._sets_fit_schedule:
            self.refresh()

    @property
    def _sets_fit_schedule(self) -> bool:
        """Whether the sets explore if and only if the schedule says so."""
        left_out = set(self.unattached) if self.is_attached else set()  # no step of theirs leads to a refresh
        return all(
            self._refresher.fits([weight for weight in weights if weight.name not in left_out], step, self.is_attached)
            for weights, step in self._groups
        )

    def _choose_first(self) -> None:
        self._refresher.begin(list(self._weights.values()))
        for weight in self._weights.values():
            weight.record_first_reservoir()

    def _look_for_zeros(self) -> None:
        """Count zeros here, on every rank, since only one of them may ask for the summary."""
        self._reshard()
        self._zeros = {name: weight.count_zeros() for name, weight in self._weights.items()}

    def _before_step(self, weights: Sequence[SparseWeight]) -> None:
        sparse = [weight for weight in weights if self._weights.get(weight.name) is weight]  # not excluded since
        check_trained(self.model, self._targets, sparse)
        self.accept_writes(weights)
        if self._strengths.unknown(weights):  # an optimizer was given another group
            self._set_strength()
        self._attached.fit_state()

    def _after_step(self, hooks: StepHooks) -> None:
        weights = hooks.weights
        # not before the step, for which there are gradients in the order of the present sets
        if late := [weight for weight in weights if weight not in hooks.trained]:
            self._refresher.join(late, hooks.steps)
        hooks.trained = set(weights)
        self._notices.warn_of_lost_reservoir(self._weights, self._zeros)
        if self._refresher.sizes_of(weights).timeline.refreshes_after(hooks.steps):
            self._notices.warn_of_left_out(self.unattached if self.refresh_count == 0 else [], self._targets)
        self._refresher.after_step(weights, hooks.steps)

    def _state_of(self, weight: SparseWeight) -> list[EntryState]:
        return self._attached.state_of(weight)

    def _set_strength(self) -> None:
        """Work out λ of the weights for which that was not done yet, for good if their learning rates are known."""
        self._strengths.set(self._attached.optimizers)

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool | None = None) -> dict[str, Any]:
        """Return sets, latent values and step counts: tensors and primitives only, loadable with `weights_only=True`.

        Args:
            gathered: return the whole tensors of sharded weights, on rank 0 only, instead of the DTensors that
                `torch.distributed.checkpoint` saves; every rank must call it then. Every rank can load the DTensors,
                and the whole tensors once it has read or received them. None: DTensors, but not where only θ of packed
                weights is shared (DDP), of which one rank might save its own part.

        Raises:
            TopKastError: `gathered` is None and θ is shared.
        """
        self._reshard()
        for weight in self._weights.values() if gathered is None else ():
            if weight.sharding.is_sharded and not weight.is_dtensor:
                raise TopKastError(
                    f"the processes share θ of the packed weight '{weight.name}': call state_dict(gathered=True) in "
                    "all of them and save what rank 0 gets (gathered=False is for torch.distributed.checkpoint), or "
                    "make TopKast with Packed(theta='replicated')"
                )
        gathered = bool(gathered)
        self.accept_writes(closely=True)
        own = self._refresher.own_sizes
        plans = {
            "plans": {name: sizes.timeline.moments for name, sizes in own.items()},
            "planned_from": moments(self.settings.schedule, self.settings.ramp),
        }
        return (plans if own else {}) | {
            "version": STATE_VERSION,
            "steps": self.optimizer_steps,
            "refresh_count": self.refresh_count,
            "shrinkage": self._strengths.shrinkage,
            "structure": str(self.settings.structure),
            "selections": [selection.state_dict(gathered) for selection in self._refresher.selections],
            "weights": {name: weight.state_dict(gathered) for name, weight in self._weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, after the model has loaded its own.

        The optimizers may load theirs before or after this, or keep it; before it is used it is moved to the sets.

        Args:
            state: what `state_dict` has returned.

        Raises:
            TopKastError: the state has another format version, other weights, other densities or damaged tensors, or
                the model does not hold the saved α. Nothing was overwritten then.
        """
        saved = SavedState.read(state, self.settings.structure, self._weights, len(self._attached) or None)
        self._reshard()
        for name, weight in self._weights.items():
            weight.check_state(saved.weights[name])
        selections = [Selection.from_state(each, self._weights) for each in saved.selections]
        strengths = {name: weight.strength for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            weight.load_state_dict(saved.weights[name])
        self._strengths.keep(strengths, saved.shrinkage)
        self._notices.looks_for_reservoir = False
        self._attached.load(saved.steps)
        self._refresher.count, self._refresher.selections = saved.refresh_count, selections
        if saved.plans and saved.planned_from == moments(self.settings.schedule, self.settings.ramp):
            sizes = self._refresher.sizes
            self._refresher.own_sizes = {
                name: sizes.with_moments(plan) for name, plan in saved.plans.items() if name in self._weights
            }
        self._look_for_zeros()
        self._follow_schedule()
