"""An optimizer whose steps are accompanied: weights are opened before its update and closed after it."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_topkast.errors import TopKastError
from lightning_topkast.method.penalty import Penalty
from lightning_topkast.weights import PackedWeight, SparseWeight

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None


class Attachment:
    """Hooks on one optimizer's own step, from `begin` on: it updates θ on B of the sparse weights, and nothing else.

    Args:
        optimizer: any optimizer that needs one gradient a step.
        weights: sparse weights by their parameter; those in the optimizer's groups are accompanied.
        penalty: form of the exploration penalty, applied after every update.
        after_step: called with this attachment after every step that was not skipped.
        looks_at_gradients: whether gradients count, also outside B, of the step that follows so many done ones.
        steps: how many steps were taken before.

    Raises:
        TopKastError: an optimizer that evaluates its closure repeatedly, that holds no sparse weight, or whose steps
            another engine accompanies already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Mapping[Tensor, SparseWeight],
        penalty: Penalty,
        after_step: Callable[["Attachment"], None],
        looks_at_gradients: Callable[[int], bool],
        steps: int = 0,
    ) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TopKastError(f"{name} is no torch.optim.Optimizer, so its steps cannot be accompanied")
        if isinstance(optimizer, LBFGS):
            raise TopKastError(
                "LBFGS evaluates its closure several times a step, but the weights can be opened for one update only; "
                "use an optimizer that needs one gradient a step (SGD, Adam, AdamW, ...)"
            )
        self.optimizer = optimizer
        self.penalty = penalty
        self.after_step = after_step
        self._looks_at_gradients = looks_at_gradients
        self.steps = steps
        self._weights_by_parameter = weights
        self._gradients_masked = False
        self._warned_of_overshoot = False
        self._handles: list[RemovableHandle] = []
        if not self.weights:
            raise TopKastError(
                f"this {name} holds none of the sparse weights; attach the optimizer made from this model (unless it "
                "is masked: made after TopKast, which changes the layers and makes the weights 1-D)"
            )
        self._warn_of_lost_decay()
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Attachment):
                for weight in self.weights:
                    if weight.parameter in other._weights_by_parameter:
                        raise TopKastError(
                            f"this {name} is attached already, for '{weight.name}': detach() the TopKast that "
                            "accompanies it first"
                        )

    @property
    def weights(self) -> list[SparseWeight]:
        """The sparse weights that the optimizer holds now; groups may have been added."""
        return [weight for weight, _ in self._weights_and_groups()]

    def begin(self) -> None:
        """Accompany the optimizer's steps from now on."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def end(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def mask_gradients(self) -> None:
        """Zero the gradients outside B, once they were looked at where they decide the next sets."""
        for weight in self.weights:
            if self.needs_gradients:
                weight.note_gradient()
            weight.mask_gradient()

    @property
    def needs_gradients(self) -> bool:
        """Whether the next step's gradients decide the next sets, also outside B."""
        return self._looks_at_gradients(self.steps)

    def prepare_step(self) -> None:
        """Mask the gradients of the next step, which then need not do it again."""
        self.mask_gradients()
        self._gradients_masked = True

    def state_of(self, weight: SparseWeight) -> list[Tensor]:
        """The optimizer's state of a weight that begins at zero: its momenta and averages, in the parameter's shape.

        Raises:
            TopKastError: the weight is packed, so that all of its state must be carried over a refresh, and some of it
                begins at something else.
        """
        found = []
        for key, value in self.optimizer.state.get(weight.parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.parameter.shape:
                if key in _ZERO_AT_FIRST:
                    found.append(value)
                elif weight.execution != "masked":
                    raise TopKastError(
                        f"{type(self.optimizer).__name__} keeps '{key}' for every entry of '{weight.name}', and what "
                        "it begins at for an entry that enters the updated set is not known; train with "
                        "execution='masked', or with an optimizer of momenta and averages (SGD, Adam, AdamW, ...)"
                    )
        return found

    @torch.no_grad()
    def align_state(self) -> None:
        """Give the optimizer's state the order of the sets where other weights were loaded since the last step."""
        for weight in self.weights:
            if isinstance(weight, PackedWeight) and weight.was_reordered:
                weight.realign(self.state_of(weight))

    def adopt_state(self, packed_only: bool = False) -> None:
        """Give state that was loaded from a run of another execution the parameters' shapes."""
        for weight in self.weights:
            if packed_only and weight.execution == "masked":
                continue
            state = self.optimizer.state.get(weight.parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = weight.adopt(value)

    # --- hooks ----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Open the weights: now, or once the closure given to `step` has computed the gradients."""
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
                    f"{type(self.optimizer).__name__} evaluates its closure more than once a step, but the weights "
                    "can be opened for one update only; use an optimizer that needs one gradient a step"
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
            # like the optimizer, leave alone what has no gradient
            if weight.parameter.grad is not None and not weight.is_open:
                weight.open()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Penalty on B, then α again."""
        self._gradients_masked = False
        # A fused optimizer under a gradient scaler skips inside its own kernel; the others are not even called.
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        stepped = False
        for weight, group in self._weights_and_groups():
            if weight.is_open:
                weight.close(self.penalty, lr=0 if skipped else self._within_reach(weight, group["lr"]))
                stepped = not skipped
            elif weight.parameter.grad is not None:
                # A subclass that goes on after super().step(), which has passed here and closed.
                weight.restore_sparsity()
        if stepped:
            if self.steps == 0:  # rather now than at the first refresh
                for weight in self.weights:
                    self.state_of(weight)
            self.steps += 1
            self.after_step(self)

    def _warn_of_lost_decay(self) -> None:
        """Packed weights are 1-D, which a rule like "no weight decay below two dimensions" takes for a bias."""
        decays = any(group.get("weight_decay") for group in self.optimizer.param_groups)
        lost = [
            weight.name
            for weight, group in self._weights_and_groups()
            if weight.parameter.dim() < len(weight.shape) and not group.get("weight_decay")
        ]
        if decays and lost:
            warnings.warn(
                f"packed weights ({', '.join(lost[:5])}) are in a group without weight decay, beside groups with it: "
                "their parameters are 1-D, so decide by name which weights decay",
                stacklevel=4,
            )

    def _weights_and_groups(self) -> Iterator[tuple[SparseWeight, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                weight = self._weights_by_parameter.get(parameter)
                if weight is not None:
                    yield weight, group

    def _within_reach(self, weight: SparseWeight, lr: float | Tensor) -> float | Tensor:
        """Warn once where a learning rate above the peak we knew would carry the penalty past zero (it stops there)."""
        if self.penalty != "l2" or isinstance(lr, Tensor) or self._warned_of_overshoot or not weight.strength:
            return lr
        if lr * weight.strength / weight.forward_density_target >= 1:
            self._warned_of_overshoot = True
            warnings.warn(
                f"the penalty would carry exploring entries of '{weight.name}' past zero (lr {lr} · strength "
                f"{weight.strength} / density {weight.forward_density_target:.4g} >= 1); it sets them to zero. "
                "Lower penalty_strength or the learning rate",
                stacklevel=2,
            )
        return lr


def _only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Whether this is `torch.distributed.checkpoint`'s way of making the state it is about to save or load.

    It gives every parameter a zero gradient and every group the learning rate 0, and calls `step(closure=None)`.
    """
    return kwargs == {"closure": None} and not any(group.get("lr", 1) for group in optimizer.param_groups)


# Momenta and averages of torch's and most other optimizers, by the names they share. Nothing else is reset: Rprop's
# step sizes and Adagrad's sums do not begin at zero, and others keep a copy of the weight in their state.
_ZERO_AT_FIRST = {
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_inf", "square_avg", "grad_avg",
    "acc_delta", "prev",
}  # fmt: skip
