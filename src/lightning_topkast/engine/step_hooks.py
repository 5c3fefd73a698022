"""Hooks on an optimizer's step, which open sparse weights before the update and close them after it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import SparseWeight

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None


class StepHooks:
    """Hooks that make one optimizer's step update θ only on B of the sparse weights, after `begin`.

    Args:
        optimizer: any optimizer that needs one gradient per step.
        weights: sparse weights by their parameter; the hooks act on those in the optimizer's groups.
        after_step: called with these hooks after every step that was not skipped.
        looks_at_gradients: returns whether the gradients of these weights outside B are used at the step after this
            number of steps.
        steps: number of steps taken before.

    Raises:
        TopKastError: `optimizer` is not an optimizer, evaluates its closure repeatedly, holds no sparse weight, or
            another `TopKast` is attached to it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Mapping[Tensor, SparseWeight],
        after_step: Callable[["StepHooks"], None],
        looks_at_gradients: Callable[[Sequence[SparseWeight], int], bool],
        steps: int = 0,
    ) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TopKastError(f"expected a torch.optim.Optimizer, got {name}")
        if isinstance(optimizer, LBFGS):
            raise TopKastError(
                "LBFGS evaluates its closure many times per step, but the weights can be opened for one update only: "
                "use an optimizer that needs one gradient per step (SGD, Adam, AdamW, ...)"
            )
        self.optimizer = optimizer
        self.after_step = after_step
        self._looks_at_gradients = looks_at_gradients
        self.steps = steps
        self._weights_by_parameter = weights
        self._gradients_masked = False
        self._warned_of_overshoot = self._warned_of_empty = False
        self._handles: list[RemovableHandle] = []
        if not self.weights:
            raise TopKastError(
                f"this {name} holds none of the sparse weights; attach the optimizer of this model (unless "
                "storage='masked': made after TopKast, which replaces layers and makes the weights 1-D)"
            )
        self._warn_of_lost_decay()
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, StepHooks):
                for weight in self.weights:
                    if weight.parameter in other._weights_by_parameter:
                        raise TopKastError(
                            f"another TopKast is already attached to this {name}, for '{weight.name}'; call its "
                            "detach() first"
                        )

    @property
    def weights(self) -> list[SparseWeight]:
        """The sparse weights that the optimizer holds now, including those of groups added since."""
        return [weight for weight, _ in self._weights_and_groups()]

    def begin(self) -> None:
        """Register the hooks."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def mask_gradients(self) -> None:
        """Zero the gradients outside B, after recording them if the next sets depend on them."""
        for weight in self.weights:
            if self.needs_gradients:
                weight.record_gradient()
            weight.mask_gradient()

    @property
    def needs_gradients(self) -> bool:
        """Whether the next sets depend on the next step's gradients, including those outside B."""
        return self._looks_at_gradients(self.weights, self.steps)

    def prepare_step(self) -> None:
        """Mask the gradients of the next step, so that the step itself need not mask them."""
        self.mask_gradients()
        self._gradients_masked = True

    def state_of(self, weight: SparseWeight) -> list[Tensor]:
        """Return the optimizer's state of a weight that starts at zero: momenta and averages in the parameter's shape.

        Raises:
            TopKastError: the weight is packed, so that a refresh must move all of its state, and some of it may not
                start at zero.
        """
        found = []
        for key, value in self.optimizer.state.get(weight.parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.parameter.shape:
                if key in _ZERO_AT_FIRST:
                    found.append(value)
                elif weight.is_packed:
                    raise TopKastError(
                        f"{type(self.optimizer).__name__} keeps '{key}' for every entry of '{weight.name}', and its "
                        "initial value for an entry that enters the updated set is not known; train with "
                        "storage='masked', or use an optimizer with momenta and averages (SGD, Adam, AdamW, ...)"
                    )
        return found

    @torch.no_grad()
    def align_state(self) -> None:
        """Put the optimizer's state in the order of the sets, if other weights were loaded since the last step."""
        for weight in self.weights:
            if weight.was_reordered:
                weight.realign(self.state_of(weight))

    def adopt_state(self, packed_only: bool = False) -> None:
        """Convert state that was loaded from a run with another storage to the parameters' shapes."""
        for weight in self.weights:
            if packed_only and not weight.is_packed:
                continue
            state = self.optimizer.state.get(weight.parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = weight.adopt(value)

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Open the weights now, or after the closure given to `step` has computed the gradients."""
        if _only_makes_state(optimizer, kwargs):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._open()
            return None
        wrapped = self._opening_after(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _opening_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluated = False

        def wrapped() -> Any:
            nonlocal evaluated
            if evaluated:
                raise TopKastError(
                    f"{type(self.optimizer).__name__} evaluates its closure more than once per step, but the weights "
                    "can be opened for one update only; use an optimizer that needs one gradient per step"
                )
            evaluated = True
            result = closure()
            self._open()
            return result

        return wrapped

    @torch.no_grad()
    def _open(self) -> None:
        self.align_state()
        if not self._gradients_masked:
            self.mask_gradients()
        for weight in self.weights:
            # like the optimizer, skip parameters without a gradient
            if weight.parameter.grad is not None and not weight.is_open:
                weight.open()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Apply the penalty on B and make the parameters α again."""
        self._gradients_masked = False
        # A fused optimizer under a gradient scaler skips the step inside its own kernel; others are not even called.
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        stepped = False
        for weight, group in self._weights_and_groups():
            if weight.is_open:
                weight.close(lr=0 if skipped else self._within_reach(weight, group["lr"]))
                self._warn_of_empty(weight)
                stepped = not skipped
            elif weight.parameter.grad is not None:
                # A subclass that continues after super().step(), whose own hook closed the weight.
                weight.restore_sparsity()
        if stepped:
            if self.steps == 0:  # raise now rather than at the first refresh
                for weight in self.weights:
                    self.state_of(weight)
            self.steps += 1
            self.after_step(self)

    def _warn_of_lost_decay(self) -> None:
        """Warn if packed weights lack weight decay: a rule such as "no decay for 1-D" takes them for biases."""
        decays = any(group.get("weight_decay") for group in self.optimizer.param_groups)
        lost = [
            weight.name
            for weight, group in self._weights_and_groups()
            if weight.parameter.dim() < len(weight.shape) and not group.get("weight_decay")
        ]
        if decays and lost:
            warnings.warn(
                f"packed weights ({', '.join(lost[:5])}) are in a group without weight decay, while other groups have "
                "it; their parameters are 1-D, so choose by name which weights decay",
                stacklevel=4,
            )

    def _weights_and_groups(self) -> Iterator[tuple[SparseWeight, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                weight = self._weights_by_parameter.get(parameter)
                if weight is not None:
                    yield weight, group

    def _within_reach(self, weight: SparseWeight, lr: float | Tensor) -> float | Tensor:
        """Return `lr`, if it exceeds the known peak, after λ was lowered, or a warning if a given λ overshoots zero."""
        weight.limit_strength(lr)
        if not isinstance(lr, Tensor) and not self._warned_of_overshoot and weight.overshoots(lr):
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
        if weight.was_emptied and not self._warned_of_empty:
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


# Names of the momenta and averages of PyTorch's and most other optimizers. No other state is reset: Rprop's step sizes
# and Adagrad's sums do not start at zero, and some optimizers keep a copy of the weight in their state.
_ZERO_AT_FIRST = {
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_inf", "square_avg", "grad_avg",
    "acc_delta", "prev",
}  # fmt: skip
