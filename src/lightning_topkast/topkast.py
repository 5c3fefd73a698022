"""Top-KAST over the weights of a model (Jayakumar et al. 2020): knows torch, not Lightning."""

import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import chain, repeat
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_topkast.engine.materialize import materialize
from lightning_topkast.engine.refresh import Refresher, Selection
from lightning_topkast.engine.step_hooks import Attachment
from lightning_topkast.engine.storage import install, make_weights, release
from lightning_topkast.engine.summary import Summary, summarize
from lightning_topkast.errors import TopKastError
from lightning_topkast.layers import packed_weights
from lightning_topkast.method import strength
from lightning_topkast.method.course import Course
from lightning_topkast.method.density import allocate
from lightning_topkast.method.schedule import RefreshSchedule
from lightning_topkast.method.targets import find_targets
from lightning_topkast.settings import Settings
from lightning_topkast.weights import PackedWeight, SparseWeight

STATE_VERSION = 1


class TopKast:
    """Keeps a model always sparse while any torch optimizer trains it.

    At construction the weights are chosen and made sparse. From `attach` on, every step of the optimizer updates
    B only, applies the exploration penalty, and every `update_every` steps chooses A and B again:

        topkast = TopKast(model, forward_sparsity=0.9, backward_sparsity=0.8).attach(optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    Args:
        model: the model; its parameters stay its own and are α (zero outside A) between steps.
        forward_sparsity: share of a weight's entries that are zero in the forward pass, in [0, 1).
        backward_sparsity: share without gradient, in [0, forward_sparsity].
        total_steps: length of the run in optimizer steps, for `stop_exploration_at` as a fraction; `plan` sets it too.
        taken: names of weights that another engine works on, which must not be ours too.
        **options: the keyword arguments of `TopKastCallback` but `all_reduce`, which is `sparse_all_reduce` here.

    Raises:
        TopKastError: a setting out of range, a pattern that matches nothing, nothing to make sparse, a weight too small
            for one active entry, sharded weights that are to be packed.
        NonFiniteWeightError: a weight holds NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        forward_sparsity: float,
        backward_sparsity: float,
        *,
        total_steps: int | float | None = None,
        taken: Collection[str] = (),
        **options: Any,
    ) -> None:
        self.model = model
        self.settings = Settings(forward_sparsity, backward_sparsity, **options)
        self._attachments: list[Attachment] = []
        # Steps taken with optimizers that were detached, or of a state loaded before any was attached.
        self._steps_before: list[int] = []

        if self.settings.execution != "masked":
            materialize(model)
        _reshard(model)
        chosen = self.settings
        self._targets = find_targets(
            model, chosen.include, chosen.exclude, chosen.include_types, chosen.exclude_types,
            chosen.keep_first_dense, chosen.keep_last_dense,
        )  # fmt: skip
        sparse, packed = [target for target in self._targets if target.sparse], packed_weights(model)
        for target in sparse:
            if target.name in taken:
                raise TopKastError(
                    f"'{target.name}' is sparse by another TopKast already; keep their targets apart with include "
                    "and exclude"
                )
            if any(getattr(module, "sparse", False) is True for module, _ in target.owners):
                raise TopKastError(
                    f"'{target.name}' gets gradients as sparse tensors, which cannot be masked; make its embedding "
                    "with sparse=False, or exclude it"
                )
            if target.name in packed:
                raise TopKastError(
                    f"'{target.name}' is packed already by an earlier TopKast; give the model its ordinary layers back "
                    "first, with that one's release() or, zero outside A, with to_dense(model)"
                )
            if isinstance(target.parameter, DTensor) and chosen.distribution == "global":
                raise TopKastError(
                    f"'{target.name}' is sharded over devices (FSDP2 or tensor parallel), where weights can't compete "
                    "for their places: choose distribution='uniform' or 'erk'"
                )
            if isinstance(target.parameter, DTensor) and (chosen.execution != "masked" or chosen.refresh_delay):
                raise TopKastError(
                    f"'{target.name}' is sharded over devices (FSDP2 or tensor parallel), which needs "
                    f"execution='masked' and refresh_delay=0, got '{chosen.execution}' and {chosen.refresh_delay}; "
                    "packed weights train with DDP"
                )
        shapes = {target.name: target.shape for target in sparse}
        self._refresher = Refresher(Course(chosen, shapes), self._state_of)
        if total_steps is not None or not chosen.needs_length:
            self.plan(total_steps)
        self._weights = make_weights(sparse, allocate(shapes, chosen), chosen)
        self._by_parameter: dict[Tensor, SparseWeight] = {weight.parameter: weight for weight in self._weights.values()}
        self._set_strength()
        self._refresher.begin(list(self._weights.values()))
        for target in sparse:
            weight = self._weights[target.name]
            weight.note_first_reservoir()
            install(target, weight)

    # --- what users read ------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, SparseWeight]:
        """The sparse weights by parameter name."""
        return MappingProxyType(self._weights)

    @property
    def step_count(self) -> int:
        """Optimizer steps taken; with several optimizers, those of the busiest."""
        return max(self._steps, default=0)

    @property
    def refresh_count(self) -> int:
        """How often sets were chosen again; with several optimizers, each counts by itself."""
        return self._refresher.count

    @property
    def schedule(self) -> RefreshSchedule:
        """When the sets are chosen again, and when exploration stops."""
        return self._refresher.course.schedule

    @property
    def exploring(self) -> bool:
        """Whether B is larger than A at the next step."""
        return self.schedule.explores_at(self.step_count)

    @property
    def unattached(self) -> list[str]:
        """Names of sparse weights that no attached optimizer holds."""
        held = {id(weight) for attachment in self._attachments for weight in attachment.weights}
        return [name for name, weight in self._weights.items() if id(weight) not in held]

    @property
    def is_attached(self) -> bool:
        """Whether optimizers' steps are accompanied at present."""
        return bool(self._attachments)

    @property
    def needs_gradients(self) -> bool:
        """Whether the next step's gradients decide the next sets, also outside B (RigL)."""
        return any(attachment.needs_gradients for attachment in self._attachments)

    @property
    def is_intact(self) -> bool:
        """Whether the model still holds these parameters, zero outside A; with sharded ones a collective."""
        _reshard(self.model)
        held = {id(parameter) for parameter in self.model.parameters()}
        return all(id(w.parameter) in held and w.is_sparse for w in self._weights.values())

    def summary(self) -> Summary:
        """Every parameter of the model: exact sizes of A and B, or why it is dense."""
        optimizers = [attachment.optimizer for attachment in self._attachments]
        return summarize(self._targets, self._weights, self.schedule, self.settings, optimizers)

    def penalty(self) -> Tensor:
        """The exploration penalty over all weights, a scalar tensor; with sharded ones a collective."""
        return torch.stack([weight.penalty(self.settings.penalty).float() for weight in self._weights.values()]).sum()

    def __getstate__(self) -> dict[str, Any]:
        """A copy accompanies no optimizer: those it may be copied with lose their hooks, as torch has it."""
        self._align_states()
        return self.__dict__ | {"_attachments": [], "_steps_before": self._steps}

    # --- the method -----------------------------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer) -> "TopKast":
        """Accompany every step of `optimizers` from now on.

        Raises:
            TopKastError: an optimizer that evaluates its closure repeatedly, that holds no sparse weight, that is
                attached already, that has no learning rate, or whose learning rate lets the penalty overshoot zero;
                or exploration shall stop at a fraction of a run of unknown length.
        """
        if not optimizers:
            raise TopKastError("attach() needs the optimizers that train the model")
        if not self._refresher.course.is_planned:
            self.plan(None)  # refuses a fraction of an unknown length
        before = self._attachments
        try:
            for optimizer, steps in zip(optimizers, chain(self._steps_before, repeat(0)), strict=False):
                if any(attachment.optimizer is optimizer for attachment in self._attachments):
                    raise TopKastError(f"this {type(optimizer).__name__} is attached already")
                attachment = Attachment(
                    optimizer, self._by_parameter, self.settings.penalty, self._after_step, self._looks_at_gradients,
                    steps,
                )  # fmt: skip
                self._attachments = [*self._attachments, attachment]
            self._set_strength()
        except TopKastError:
            self._attachments = before
            raise
        for weight in self._weights.values():
            weight.match_layout()
            if isinstance(weight, PackedWeight):
                weight.forget_order()
        for attachment in self._attachments[len(before) :]:
            # masked: only if the sets that a packed state belongs to were loaded
            attachment.adopt_state(packed_only=not self._steps_before)
            attachment.begin()
        self._steps_before = []
        return self

    def plan(self, total_steps: int | float | None) -> None:
        """Set the run's length in optimizer steps, of which `stop_exploration_at` may be a fraction."""
        self._refresher.course = self._refresher.course.planned(total_steps)

    def detach(self) -> None:
        """Stop accompanying the optimizers; the model stays sparse as it is, and the step count is kept."""
        self.close()
        self._align_states()
        self._steps_before = self._steps
        for attachment in self._attachments:
            attachment.end()
        self._attachments = []

    def release(self) -> None:
        """Put every stored θ back into the model, which then is dense; this engine is of no more use."""
        self.detach()
        _reshard(self.model)
        for target in self._targets:
            if target.name in self._weights:
                release(target, self._weights[target.name])

    def leave_out(self, names: Collection[str]) -> None:
        """Make the named weights dense again, and leave them alone from now on."""
        _reshard(self.model)
        for target in self._targets:
            if target.name in names:
                release(target, self._weights.pop(target.name))
                target.reason = "frozen"
        self._by_parameter = {weight.parameter: weight for weight in self._weights.values()}

    def restart(self) -> None:
        """Begin a new run over the same weights: count steps from 0, and explore again if that had stopped."""
        for attachment in self._attachments:
            attachment.steps = 0
        self._steps_before = []
        self._refresher.selections.clear()
        if self.settings.chosen_ramp is not None and self.refresh_count:
            self.refresh()  # to where the ramp begins
        self._follow_schedule()

    def follow(self, follower: Callable[[], None] | None) -> None:
        """Call `follower` after every refresh; None: nobody any more."""
        self._refresher.follower = follower

    def mask_gradients(self) -> None:
        """Zero the gradients outside B, so that clipping and logged norms see what the optimizer will use.

        Every step does this by itself; call it only to clip or log gradients in a loop of your own.
        """
        for attachment in self._attachments:
            attachment.mask_gradients()

    def prepare_step(self, optimizer: Optimizer) -> None:
        """Mask the gradients of the step that `optimizer` takes next, which then need not do it again."""
        for attachment in self._attachments:
            if attachment.optimizer is optimizer:
                attachment.prepare_step()

    def refresh(self) -> None:
        """Choose A and B of every weight again, now.

        Raises:
            NonFiniteWeightError: a weight holds NaN or infinity; no weight's sets were changed.
            TopKastError: the ranks disagree.
        """
        _reshard(self.model)
        self.close()
        self._align_states()  # what left B when other weights were loaded has lost its state, also if it comes back now
        self._refresher.selections.clear()
        self._refresher.refresh(list(self._weights.values()), self.step_count)

    def close(self) -> None:
        """Make every parameter α again where a step or a refresh was broken off; without one, nothing changes."""
        for weight in self._weights.values():
            weight.recover()

    def restore_sparsity(self) -> None:
        """Make every parameter zero outside A again after somebody else wrote to it; θ elsewhere is kept."""
        _reshard(self.model)
        for weight in self._weights.values():
            weight.restore_sparsity()

    @property
    def _steps(self) -> list[int]:
        """Steps taken with each optimizer."""
        return [attachment.steps for attachment in self._attachments] or self._steps_before

    def _align_states(self) -> None:
        """Let optimizers' state, which is about to be kept without us, belong to the present sets."""
        for attachment in self._attachments:
            attachment.align_state()

    def _follow_schedule(self) -> None:
        """Refresh if the schedule has changed under the sets: they explore where they should not, or the reverse."""
        if not self._refresher.course.is_planned:
            return
        counts = self._refresher.course.counts_at(self.step_count)
        explore = any(updated > active for name, (active, updated) in counts.items() if name in self._weights)
        if explore != any(weight.is_exploring for weight in self._weights.values()):
            self.refresh()

    def _after_step(self, attachment: Attachment) -> None:
        if self.refresh_count == 0 and self.unattached and self.schedule.refreshes_after(attachment.steps):
            warnings.warn(
                f"no attached optimizer holds {', '.join(self.unattached[:5])}: what trains them, if anything, "
                "does not keep them sparse; attach its optimizer too, or exclude them",
                stacklevel=2,
            )
        self._refresher.after_step(attachment.weights, attachment.steps)

    def _looks_at_gradients(self, steps: int) -> bool:
        return self._refresher.course.looks_at_gradients(steps)

    def _state_of(self, weight: SparseWeight) -> list[Tensor]:
        return [tensor for attachment in self._attachments for tensor in attachment.state_of(weight)]

    def _check_order(self, weight: SparseWeight, saved: Mapping[str, Any]) -> None:
        """Refuse sets that an optimizer's dense state, gathered by others, can't follow any more."""
        gathered = isinstance(weight, PackedWeight) and weight.has_gathered and bool(self._state_of(weight))
        if gathered and saved.get("execution", "masked") == "masked" and not torch.equal(weight.tiers, saved["tiers"]):
            raise TopKastError(
                f"the optimizer's state of '{weight.name}' comes from a masked run, and attach() has taken it over for "
                "other sets than the saved ones: load the saved Top-KAST state before attach(), or load the "
                "optimizer's after it"
            )

    def _set_strength(self) -> None:
        peaks = strength.peak_learning_rates(self._weights, [attachment.optimizer for attachment in self._attachments])
        for name, weight in self._weights.items():
            weight.strength = strength.strength_of(self.settings, name, weight.forward_density_target, peaks.get(name))

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, gathered: bool = False) -> dict[str, Any]:
        """Sets, reserves and step counts: tensors and primitives only, so it loads under `weights_only=True`.

        Args:
            gathered: of sharded weights, give tensors whole and on rank 0 only, instead of the DTensors that
                `torch.distributed.checkpoint` saves; every rank must ask then. Every rank can load the DTensors, and
                the whole ones once it has read or been sent them.
        """
        self._align_states()
        return {
            "version": STATE_VERSION,
            "steps": self._steps,
            "refresh_count": self.refresh_count,
            "penalty_shrinkage": self.settings.penalty_shrinkage,
            "granularity": str(self.settings.chosen_granularity),
            "selections": [selection.state_dict() for selection in self._refresher.selections],
            "weights": {name: weight.state_dict(gathered) for name, weight in self._weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, after the model and its optimizers have loaded theirs.

        Raises:
            TopKastError: another format version, other weights, other densities, damaged tensors, or a model that
                does not hold the saved α. Nothing was overwritten then.
        """
        if not isinstance(state, Mapping):
            raise TopKastError(f"the saved Top-KAST state is damaged: expected a dict, found {type(state).__name__}")
        version, pending, shrinkage = (state.get(key) for key in ("version", "selections", "penalty_shrinkage"))
        pending = [] if pending is None else pending
        if not isinstance(version, int) or version != STATE_VERSION:
            raise TopKastError(f"the saved Top-KAST state has format version {version!r:.60}, expected {STATE_VERSION}")
        saved, steps, refreshes = state.get("weights"), state.get("steps"), state.get("refresh_count")
        if (
            not isinstance(saved, dict)
            or not isinstance(steps, list)
            or not isinstance(pending, list)
            or not isinstance(refreshes, int)
            or not isinstance(shrinkage, float | int | None)
            or not all(isinstance(count, int) and count >= 0 for count in (*steps, refreshes))
        ):
            raise TopKastError("the saved Top-KAST state is damaged: it has no weights or no step counts")
        units = state.get("granularity", "entry")  # states saved before there were others
        if units != str(self.settings.chosen_granularity):
            raise TopKastError(
                f"the saved Top-KAST state has sets of granularity {units!r:.60}, this run asks for "
                f"'{self.settings.chosen_granularity}'; resume with the granularity and block_shape it had"
            )
        missing, extra = (
            sorted(self._weights.keys() - saved.keys()),
            sorted(map(str, saved.keys() - self._weights.keys())),
        )
        if missing or extra:
            raise TopKastError(
                f"the saved Top-KAST state belongs to other sparse weights: it lacks {missing or 'none'} and has "
                f"{extra or 'none'} in excess; resume with the model, include and exclude it was saved with"
            )
        if self._attachments and len(steps) != len(self._attachments):
            raise TopKastError(f"the saved state counts {len(steps)} optimizers, this run has {len(self._attachments)}")
        _reshard(self.model)
        for name, weight in self._weights.items():
            weight.check_state(saved[name])
            self._check_order(weight, saved[name])
        selections = [Selection.from_state(each, self._weights) for each in pending]
        # A strength worked out from the learning rate's peak is kept: the peak may not be known any more.
        keep_strength = shrinkage is not None and shrinkage == self.settings.penalty_shrinkage
        for name, weight in self._weights.items():
            asked = weight.strength
            weight.load_state_dict(saved[name])
            if not keep_strength:
                weight.strength = asked
        for attachment in self._attachments:
            attachment.adopt_state()
        self._steps_before = [] if self._attachments else list(steps)
        for attachment, count in zip(self._attachments, steps, strict=False):
            attachment.steps = count
        self._refresher.count, self._refresher.selections = refreshes, selections
        self._follow_schedule()


def _reshard(model: nn.Module) -> None:
    """Let a model under FSDP2 hold its shards, which it doesn't after a forward pass without a backward one.

    What is written into the shards would not be seen by the next forward pass either.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
