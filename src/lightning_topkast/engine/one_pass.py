"""Steps of PyTorch's SGD, Adam and AdamW on masked weights that one compiled pass takes over, with the same bits."""

import inspect
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_topkast.ops.step import Entries, Update, is_compiled_for, step_
from lightning_topkast.weights import SparseWeight

# class → module and name of the function with the update
_FUNCTIONS: dict[type[Optimizer], tuple[str, str]] = {
    SGD: (SGD.__module__, "sgd"),
    Adam: (Adam.__module__, "adam"),
    AdamW: (Adam.__module__, "adam"),
}
# what their steps depend on: numbers, variants of the update that the pass has too, and options that it has not
_NUMBERS = frozenset({"lr", "weight_decay", "momentum", "dampening", "eps", "betas"})
_VARIANTS = frozenset({"nesterov", "fused", "decoupled_weight_decay"})
_REFUSED = frozenset({"foreach", "maximize", "differentiable", "capturable", "amsgrad"})
_SMALLEST = 5e-324  # a denormal number
_TRIAL = (1 << 16) + 7  # entries, so many that the pass is compiled; the last ones fill no vector


class OnePass:
    """Steps of weights that are taken in the place of the optimizer, which skips what has no gradient."""

    def __init__(self) -> None:
        self._gradients: dict[SparseWeight, Tensor] = {}  # of the weights whose step was taken

    def take(
        self,
        optimizer: Optimizer,
        weight: SparseWeight,
        group: dict[str, Any],
        masks: bool,
        limited: Callable[[float | Tensor], float | Tensor],
    ) -> bool:
        """Take the step of a weight and hide its gradient, if that can be; return whether it was done.

        Args:
            optimizer: whose step begins; see `is_plain`.
            weight: with a gradient.
            group: the optimizer's, of its parameter.
            masks: whether the gradient was not masked yet.
            limited: returns the learning rate, after a look at what the penalty does with it.
        """
        parameter = weight.parameter
        update = None if weight.is_packed or weight.is_open else update_of(optimizer, group, parameter)
        if update is None or not weight.step(update, limited(group["lr"]), masks):
            return False
        assert parameter.grad is not None
        self._gradients[weight], parameter.grad = parameter.grad, None
        return True

    def end(self, weight: SparseWeight) -> bool:
        """Give the gradient of a weight back after the optimizer's step; return whether its step was taken here."""
        if weight not in self._gradients:
            return False
        weight.parameter.grad = self._gradients.pop(weight)
        return True

    def recover(self) -> None:
        """Give back the gradients of a step that failed, unless there are new ones."""
        for weight, gradient in self._gradients.items():
            if weight.parameter.grad is None:
                weight.parameter.grad = gradient
        self._gradients.clear()


def is_plain(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's next step is PyTorch's own, and nobody else looks on between its hooks.

    Its step must not be replaced, nor the function that it calls. No tensor may be there twice, such as the gradient of
    two parameters, since then the order of the updates matters. Denormal numbers must not be flushed by some threads
    only.
    """
    cls = type(optimizer)
    if cls not in _ORIGINAL or len(optimizer._optimizer_step_pre_hooks) > 1:
        return False
    if len(optimizer._optimizer_step_post_hooks) > 1 or _now(optimizer) != _ORIGINAL[cls]:
        return False
    if _SMALLEST * 1.0 == 0.0 and torch.get_num_threads() > 1:
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return len({*map(id, [*parameters, *tensors])}) == len(parameters) + len(tensors)


def update_of(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Update | None:
    """Return what a plain optimizer's next step does to a parameter; None if we may not take it over.

    It must have no option that changes more than numbers. PyTorch rounds as its compiler and libraries decide, so once
    per process and kind of update a trial shows whether the pass gives the same bits.

    Args:
        optimizer: whose step begins; see `is_plain`.
        group: the parameter's.
        parameter: with a gradient.
    """
    update = _update(optimizer, group, parameter) if is_compiled_for(parameter) else None
    if update is None or not _gives_the_same(type(optimizer).__name__, *_kind(group)):
        return None
    return update


def _now(optimizer: Any) -> tuple[Any, Any]:
    """Return the functions that a step runs, without what Optimizer and learning rate schedulers wrap around them."""
    module, name = _FUNCTIONS[type(optimizer) if isinstance(optimizer, Optimizer) else optimizer]
    return inspect.unwrap(optimizer.step), getattr(sys.modules[module], name)


def _update(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Update | None:
    cls, state = type(optimizer), optimizer.state.get(parameter, {})
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    gradient_is_lazy = parameter.grad is not None and (parameter.grad.is_neg() or parameter.grad.is_conj())
    is_unknown = not optimizer.defaults.keys() <= _NUMBERS | _VARIANTS | _REFUSED  # as of a newer PyTorch
    if scaled or gradient_is_lazy or is_unknown or any(group.get(option) for option in _REFUSED):
        return None
    numbers = [group[name] for name in _NUMBERS & group.keys() - {"betas"}] + [*group.get("betas", ())]
    if not all(isinstance(number, float | int) for number in numbers):
        return None
    return _sgd(group, state) if cls is SGD else _adam(group, state, decoupled=cls is AdamW)


def _sgd(group: dict[str, Any], state: dict[str, Any]) -> Update | None:
    buffer = state.get("momentum_buffer")
    is_new = bool(group["momentum"]) and buffer is None
    if group.get("fused") or is_new:  # the fused one rounds the last entries otherwise
        return None
    options = group["weight_decay"], group["momentum"], 1 - group["dampening"], -group["lr"], float(group["nesterov"])
    return Update("sgd", options, () if buffer is None or not group["momentum"] else (buffer,))


def _adam(group: dict[str, Any], state: dict[str, Any], decoupled: bool) -> Update | None:
    if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        return None
    step = state["step"]
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device.type != "cpu" or step.numel() != 1:
        return None
    if group["betas"][0] == 0:  # where the last entries get another sign of a zero
        return None
    lr, decay, (beta1, beta2), fused = group["lr"], group["weight_decay"], group["betas"], bool(group.get("fused"))
    count = float(step) + 1
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    root = math.sqrt(correction2) if fused else correction2**0.5
    decoupled = group.get("decoupled_weight_decay", decoupled)
    factor, added = (1 - lr * decay, 0.0) if decoupled else (1.0, decay)
    options = factor, added, 1 - beta1, beta2, 1 - beta2, root, group["eps"], -(lr / correction1)
    return Update("adam", options, (state["exp_avg"], state["exp_avg_sq"]), step, uses_mkl=not fused)


def _kind(group: dict[str, Any]) -> tuple[bool, ...]:
    """Return which operations the optimizer uses, whatever the numbers."""
    momentum, nesterov = group.get("momentum"), group.get("nesterov")
    small = 1 - group.get("betas", (1.0,))[0] < 0.5
    return bool(group.get("fused")), bool(group["weight_decay"]), bool(momentum), bool(nesterov), small


_ORIGINAL = {cls: _now(cls) for cls in _FUNCTIONS}


@cache
def _gives_the_same(name: str, fused: bool, decays: bool, momentum: bool, nesterov: bool, small: bool) -> bool:
    """Return whether the pass updates values and state to the same bits as the optimizer of this name."""
    cls = next(each for each in _FUNCTIONS if each.__name__ == name)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        """Return numbers of many magnitudes, down to denormal ones, and zeros."""
        normal = torch.randn(3, _TRIAL, generator=generator, device="cpu", dtype=torch.float32)
        return normal[0] * 10 ** (9 * normal[1] - 9).clamp(-42, 2) * (normal[2] < 1)

    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 1e-2 if decays else 0.0, "fused": fused}
    if cls is SGD:
        options |= {"momentum": 0.9 if momentum else 0.0, "dampening": 0.0 if nesterov else 0.1, "nesterov": nesterov}
    else:
        options |= {"betas": (0.9 if small else 0.4, 0.99)}
    parameter = nn.Parameter(drawn())
    optimizer = cls([parameter], **options)
    parameter.grad = drawn()
    if cls is not SGD:
        step = torch.tensor(6.0, device="cpu")
        optimizer.state[parameter] = {"step": step, "exp_avg": drawn(), "exp_avg_sq": drawn().abs()}
    elif momentum:
        optimizer.state[parameter] = {"momentum_buffer": drawn()}
    update = _update(optimizer, optimizer.param_groups[0], parameter)
    if update is None:
        return False
    update = update._replace(state=tuple(each.clone() for each in update.state), steps=None)
    values, nothing = parameter.detach().clone(), torch.empty(0, device="cpu", dtype=torch.float32)
    members = torch.full((_TRIAL,), -1, dtype=torch.int8, device="cpu")
    entries = Entries(values, members, nothing.long(), nothing, (1.0, 1.0))
    if not step_(entries, parameter.grad.clone(), False, update):
        return False
    with torch.no_grad():
        inspect.unwrap(cls.step)(optimizer)  # without hooks, which may be global
    state = [each for each in optimizer.state[parameter].values() if each.shape == parameter.shape]
    pairs = zip([values, *update.state], [parameter.detach(), *state], strict=True)
    return all(torch.equal(own.view(torch.int32), theirs.view(torch.int32)) for own, theirs in pairs)
