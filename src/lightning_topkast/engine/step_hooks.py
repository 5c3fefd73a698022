"""Hooks on an optimizer's step, which open sparse weights before the update and close them after it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_topkast.engine import cuda_graph
from lightning_topkast.engine.fused_steps import close_weights, mask_gradients, open_weights
from lightning_topkast.engine.one_pass import OnePass, is_plain
from lightning_topkast.engine.optimizer_state import OptimizerState
from lightning_topkast.engine.optimizers import (
    calls_hooks,
    check_hidden_state,
    check_optimizer,
    entry_states,
    inner_optimizers,
    state_of,
)
from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import EntryState, SparseWeight
from lightning_topkast.weights.writes import stamp

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None


class StepHooks:
    """Hooks that make one optimizer's step update θ only on B of the sparse weights, after `begin`.

    Other optimizers may step on the same weights: one inside a wrapper, or one made anew. `join` hooks them too. What
    happens inside the step of one optimizer, such as the step of the one that it wraps, is part of that step.

    Args:
        optimizer: any optimizer that needs one gradient per step.
        weights: sparse weights by their parameter; the hooks act on those in the optimizer's groups.
        after_step: called with these hooks after every step that was not skipped.
        looks_at_gradients: returns whether the gradients of these weights outside B are used at the step after this
            number of steps.
        before_step: called before every step with the weights that it updates.
        steps: number of steps taken before.

    Raises:
        TopKastError: `optimizer` is not an optimizer, cannot train sparse weights, holds no sparse weight, or another
            `TopKast` is attached to it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Mapping[Tensor, SparseWeight],
        after_step: Callable[["StepHooks"], None],
        looks_at_gradients: Callable[[Sequence[SparseWeight], int], bool],
        before_step: Callable[[Sequence[SparseWeight]], None],
        steps: int = 0,
    ) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TopKastError(f"expected a torch.optim.Optimizer, got {name}")
        self.after_step = after_step
        self._looks_at_gradients = looks_at_gradients
        self._before_step_of = before_step
        self.steps = steps
        self.seen = 0  # steps, with those that were skipped
        # of steps that are being captured in a graph, and so compute nothing: whether they update a weight
        self.captured: list[bool] | None = None
        self._weights_by_parameter = weights
        # weak, so that an optimizer that was replaced is freed; the first one is the one that was attached
        self._optimizers: list[ref[Optimizer]] = []
        self._last_held: list[SparseWeight] = []
        self._stepping: ref[Optimizer] | None = None  # the outermost optimizer whose step is in progress
        # gradients that were masked for the next step, and how they were left
        self._masked: dict[SparseWeight, tuple[Tensor, tuple[int, int, int]]] = {}
        self._one_pass = OnePass()
        self._checked: list[ref[Optimizer]] = []  # those whose state was found to be known
        self._warned_of_overshoot = self._warned_of_empty = False
        self._handles: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()
        self._watches: list[RemovableHandle] = []
        self._state = OptimizerState(self._held_by)
        if not self._held_by(optimizer):
            raise TopKastError(
                f"this {name} holds none of the sparse weights; attach the optimizer of this model (unless "
                "storage='masked': made after TopKast, which replaces layers and makes the weights 1-D)"
            )
        for each in [optimizer, *inner_optimizers(optimizer)]:
            self._check(each)
        if not calls_hooks(optimizer) and not any(map(calls_hooks, inner_optimizers(optimizer))):
            raise TopKastError(
                f"{name} calls no hooks on its steps, since its __init__ does not call that of torch.optim.Optimizer; "
                "call it there, or attach the optimizer inside it"
            )
        self._optimizers = [ref(optimizer)]
        self._last_held = self._held_by(optimizer)
        self.trained = set(self._last_held)  # those of the last step; others are late
        self._warn_of_lost_decay()

    def _check(self, optimizer: Optimizer) -> None:
        held = self._held_by(optimizer)
        check_optimizer(optimizer, [weight.name for weight in held if weight.is_packed])
        check_hidden_state(optimizer, {weight.name: weight.parameter for weight in held})
        for hook in getattr(optimizer, "_optimizer_step_pre_hooks", {}).values():
            other = getattr(hook, "__self__", None)
            for weight in held if isinstance(other, StepHooks) else ():
                if weight.parameter in other._weights_by_parameter:  # type: ignore[union-attr]
                    raise TopKastError(
                        f"another TopKast is already attached to this {type(optimizer).__name__}, for '{weight.name}'; "
                        "call its detach() first"
                    )

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that step on the weights, first the one that was attached; without those that are gone."""
        return [optimizer for each in self._optimizers if (optimizer := each()) is not None]

    @property
    def weights(self) -> list[SparseWeight]:
        """The sparse weights that the optimizers hold now, including those of groups added since.

        Once all optimizers are gone, those that they held at last, since another may be made for them.
        """
        held = [self._held_by(optimizer) for optimizer in self.optimizers]
        if held:
            self._last_held = list(dict.fromkeys(weight for weights in held for weight in weights))
        return self._last_held

    def _held_by(self, optimizer: Optimizer) -> list[SparseWeight]:
        return [weight for weight, _ in self._weights_and_groups(optimizer)]

    def begin(self, orders: Mapping[str, int]) -> None:
        """Register the hooks.

        Args:
            orders: of the optimizer's state, if it is a copy; see `OptimizerState.begin`.
        """
        for optimizer in self.optimizers:
            self._state.begin(optimizer, orders)
            self._hook(optimizer)

    @property
    def orders(self) -> dict[str, int]:
        """Weight name → the order of the optimizers' state, for copies of them."""
        return {name: order for each in self.optimizers for name, order in self._state.orders(each).items()}

    def _hook(self, optimizer: Optimizer) -> None:
        if calls_hooks(optimizer):
            self._watches += self._state.watch(optimizer)
            self._handles[optimizer] = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def join(self, optimizer: Optimizer) -> None:
        """Act on the steps of another optimizer of the same weights too, beginning with the one that it takes now."""
        self._check(optimizer)
        self._optimizers = [each for each in self._optimizers if each() is not None] + [ref(optimizer)]
        self.fit_state()
        self._hook(optimizer)

    def end(self) -> None:
        """Remove the hooks on steps; state is saved as it fits the sets until `end_watching`."""
        self.recover()
        self.leave_state()
        for handle in chain.from_iterable(self._handles.values()):
            handle.remove()
        self._handles.clear()

    def leave_state(self) -> None:
        """Leave the optimizers' state to code that does not know of us."""
        for optimizer in self.optimizers:
            self._state.leave(optimizer)

    def end_watching(self) -> None:
        """Remove the hooks on the optimizers' state."""
        for handle in self._watches:
            handle.remove()
        self._watches.clear()

    def recover(self) -> None:
        """Forget a step that was interrupted, of which some weights may have been updated, as PyTorch's would be."""
        self._stepping = None
        self._masked.clear()
        self._one_pass.recover()

    def mask_gradients(self) -> None:
        """Zero the gradients outside B, after recording them if the next sets depend on them."""
        self._record_gradients()
        mask_gradients(self.weights)

    def _record_gradients(self) -> None:
        for weight in self.weights if self.needs_gradients else ():
            weight.record_gradient()

    @property
    def needs_gradients(self) -> bool:
        """Whether the next sets depend on the next step's gradients, including those outside B."""
        return self._looks_at_gradients(self.weights, self.steps)

    def prepare_step(self) -> None:
        """Mask the gradients of the next step, so that the step itself need not mask them."""
        self.mask_gradients()
        gradients = {weight: weight.parameter.grad for weight in self.weights}
        self._masked = {
            weight: (gradient, stamp(gradient)) for weight, gradient in gradients.items() if gradient is not None
        }

    def _is_masked(self, weight: SparseWeight) -> bool:
        """Return whether the gradient was masked for this step, and not written by other code since, such as noise."""
        gradient, seen = weight.parameter.grad, self._masked.get(weight)
        return gradient is not None and seen is not None and seen[0] is gradient and seen[1] == stamp(gradient)

    def state_of(self, weight: SparseWeight) -> list[EntryState]:
        """Return the state that the optimizers keep for the entries of a weight, which then fits its sets.

        Raises:
            TopKastError: some of the state is not known.
        """
        self._warn_of_new([name for optimizer in self.optimizers for name in self._state.fit(optimizer, [weight])])
        parameter, name = weight.parameter, weight.name
        return [
            entry
            for optimizer in self.optimizers
            for entry in entry_states(optimizer, parameter, name, state_of(optimizer, parameter))
        ]

    def fit_state(self) -> None:
        """Make the optimizers' state fit the sets before it is used, if either was loaded."""
        self._warn_of_new(
            [name for optimizer in self.optimizers for name in self._state.fit(optimizer, self._held_by(optimizer))]
        )

    def _warn_of_new(self, names: Sequence[str]) -> None:
        if names:
            warnings.warn(
                f"the optimizer's state of {', '.join(names[:5])} was saved with other sets than the present ones, and "
                "in which order it is, is not known, so it begins anew there; put back the state of TopKast of the "
                "same moment too: topkast.load_state_dict(state)",
                stacklevel=3,
            )

    # --- hooks ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step calls it
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Open the weights now, or after the closure given to `step` has computed the gradients."""
        if self._is_inside_another(optimizer):
            return None
        if self.captured is None and cuda_graph.CudaGraph.is_capturing():
            raise TopKastError(
                f"a step of {type(optimizer).__name__} is captured in a CUDA graph, which would not call its TopKast "
                "when it is replayed: let topkast.capture(step) capture it, with one TopKast for all of the step"
            )
        self._one_pass.recover()  # from a step that failed
        if _only_makes_state(optimizer, kwargs):
            return None
        self._stepping = ref(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._open(optimizer)
            return None
        wrapped = self._opening_after(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _is_inside_another(self, optimizer: Optimizer) -> bool:
        """Return whether this is a step within the step of an optimizer that wraps this one."""
        outer = None if self._stepping is None else self._stepping()
        return outer is not None and any(each is optimizer for each in inner_optimizers(outer))

    def _opening_after(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        evaluated = False

        def wrapped() -> Any:
            nonlocal evaluated
            if evaluated:
                raise TopKastError(
                    f"{type(optimizer).__name__} evaluates its closure more than once per step, but the weights "
                    "can be opened for one update only; use an optimizer that needs one gradient per step"
                )
            evaluated = True
            result = closure()
            self._open(optimizer)
            return result

        return wrapped

    @torch.no_grad()
    def _open(self, optimizer: Optimizer) -> None:
        weights = self._held_by(optimizer)
        self._before_step_of(weights)
        if not self._masked:  # recording them after they were masked would be wrong
            self._record_gradients()
        plain = not all(weight.is_packed for weight in weights) and is_plain(optimizer)
        closed, masked = [], []
        for weight, group in self._weights_and_groups(optimizer):
            if weight.parameter.grad is None:  # like the optimizer, skip these
                continue
            masks = not self._is_masked(weight)
            limited = partial(self._within_reach, weight)
            if plain and self._one_pass.take(optimizer, weight, group, masks, limited):
                continue
            if masks:
                masked.append(weight)
            if not weight.is_open:
                closed.append(weight)
        open_weights(closed, masked)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Apply the penalty on B and make the parameters α again."""
        if self._is_inside_another(optimizer):
            return
        self._stepping = None
        self._masked.clear()
        stepped = self._close(optimizer)
        if self.captured is not None:
            self.captured.append(stepped)
            return
        self.seen += 1
        if stepped:
            self._count_step()

    def _close(self, optimizer: Optimizer) -> bool:
        """Close the weights; return whether the optimizer has updated any."""
        # A fused optimizer under a gradient scaler skips the step inside its own kernel; others are not even called.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and self.captured is not None:
            raise TopKastError("a gradient scaler decides about every step on the host; train in bfloat16 without one")
        skipped = found_inf is not None and bool(found_inf)
        ended, opened = [], []
        for weight, group in self._weights_and_groups(optimizer):
            if self._one_pass.end(weight):
                ended.append(weight)
            elif weight.is_open:
                opened.append((weight, 0.0 if skipped else self._within_reach(weight, group["lr"])))
            elif weight.parameter.grad is not None:
                # A subclass that continues after super().step(), whose own hook closed the weight.
                weight.restore_sparsity()
        close_weights(opened)
        for weight in (*ended, *(weight for weight, _ in opened)):
            self._warn_of_empty(weight)
        return bool(ended or (opened and not skipped))

    def _count_step(self) -> None:
        if self._optimizers[-1] not in self._checked:  # raise now rather than at the first refresh
            self._check_state()
        self.steps += 1
        self.after_step(self)

    # --- steps by a captured graph --------------------------------------------------------------------------------

    @torch.no_grad()
    def before_replay(self) -> None:
        """Do what has to be done on the host before a step that a graph takes."""
        self._before_step_of(self.weights)

    @torch.no_grad()
    def after_replay(self, updates: bool) -> None:
        """Count a step that a graph has taken, if it updates a weight, and refresh the sets if that is due."""
        self.seen += 1
        if updates:
            for weight in self.weights:
                weight.end_step()
            self._count_step()

    def abandon_step(self) -> None:
        """Forget a step whose recording failed, which has computed nothing."""
        self._stepping = None
        self._masked.clear()
        for weight in self.weights:
            weight.abandon_step()

    def _check_state(self) -> None:
        """Refuse state that is not known, once it exists."""
        for weight in self.weights:
            self.state_of(weight)
        for optimizer in self.optimizers:
            check_hidden_state(optimizer, {weight.name: weight.parameter for weight in self._held_by(optimizer)})
        self._checked = list(self._optimizers)

    def _warn_of_lost_decay(self) -> None:
        """Warn if packed weights lack weight decay: a rule such as "no decay for 1-D" takes them for biases."""
        (optimizer,) = self.optimizers
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        lost = [
            weight.name
            for weight, group in self._weights_and_groups(optimizer)
            if weight.parameter.dim() < len(weight.shape) and not group.get("weight_decay")
        ]
        if decays and lost:
            warnings.warn(
                f"packed weights ({', '.join(lost[:5])}) are in a group without weight decay, while other groups have "
                "it; their parameters are 1-D, so choose by name which weights decay",
                stacklevel=4,
            )

    def _weights_and_groups(self, optimizer: Optimizer) -> Iterator[tuple[SparseWeight, dict[str, Any]]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                weight = self._weights_by_parameter.get(parameter)
                if weight is not None:
                    yield weight, group

    def _within_reach(self, weight: SparseWeight, lr: float | Tensor) -> float | Tensor:
        """Return `lr`, if it exceeds the known peak, after λ was lowered, or a warning if a given λ overshoots zero."""
        weight.shrinkage.limit(lr)
        if not isinstance(lr, Tensor) and not self._warned_of_overshoot and weight.shrinkage.overshoots(lr):
            self._warned_of_overshoot = True
            warnings.warn(
                f"the penalty would carry exploring entries of '{weight.name}' past zero (lr {lr} · strength "
                f"{weight.strength} / density {weight.forward_density_target:.4g} >= 1) and sets them to zero instead; "
                "lower the penalty's strength or the learning rate",
                stacklevel=2,
            )
        return lr

    def _warn_of_empty(self, weight: SparseWeight) -> None:
        """Warn once if the penalty has set all active entries of a weight to zero."""
        if weight.shrinkage.was_emptied and not self._warned_of_empty:
            self._warned_of_empty = True
            warnings.warn(
                f"the penalty would carry active entries of '{weight.name}' past zero and has set all of them to zero "
                f"(strength {weight.strength}); lower the penalty's strength or the learning rate",
                stacklevel=2,
            )


def _only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Return whether `torch.distributed.checkpoint` calls `step` only to create the state that it saves or loads.

    It gives every parameter a zero gradient and every group the learning rate 0, and calls `step(closure=None)`.
    """
    return kwargs == {"closure": None} and not any(group.get("lr", 1) for group in optimizer.param_groups)
