"""Noticing what other code does to sparse weights: optimizers that step on them, and weights that are loaded."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol
from weakref import WeakMethod, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_topkast.distributed import to_local
from lightning_topkast.errors import NonFiniteWeightError, TopKastError
from lightning_topkast.weights import MaskedWeight, SparseWeight


class Observer(Protocol):
    """What `watch_steps` informs."""

    def meet(self, optimizer: Optimizer) -> None:
        """Called before a step of any optimizer of this process."""


_observers: WeakSet[Observer] = WeakSet()
_hook: RemovableHandle | None = None  # never removed, since it may be called meanwhile


def watch_steps(observer: Observer) -> None:
    """Inform `observer` of every step of any optimizer of this process, until `unwatch_steps` or its end."""
    global _hook
    _observers.add(observer)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def unwatch_steps(observer: Observer) -> None:
    """Undo `watch_steps`."""
    _observers.discard(observer)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step calls it
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for observer in list(_observers):
        observer.meet(optimizer)


def watch_module(
    weight: MaskedWeight, owners: Sequence[tuple[nn.Module, str]], accept: Callable[[Sequence[SparseWeight]], None]
) -> list[RemovableHandle]:
    """Let a weight go on from what `load_state_dict` of its modules writes, and let their `state_dict` give it as α.

    Args:
        weight: a masked one; packed layers do this themselves.
        owners: its modules, each with its name for it.
        accept: a method that accepts what other code has written to weights.
    """
    handles = []
    for module, name in owners:
        handles.append(module.register_load_state_dict_pre_hook(_BeforeLoading(weight, name)))
        handles.append(module.register_load_state_dict_post_hook(_AfterLoading(weight)))
        if not weight.sharding.is_sharded:  # one process may save alone
            handles.append(module.register_state_dict_pre_hook(_BeforeSaving(weight, WeakMethod(accept))))
    return handles


class _ModuleHook:
    """A hook on a module; copied or pickled with the module, it becomes one that does nothing."""

    def __init__(self, weight: MaskedWeight) -> None:
        self.weight = ref(weight)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and needs nothing of this package


class _BeforeSaving(_ModuleHook):
    """Called before a module gives its state."""

    def __init__(self, weight: MaskedWeight, accept: WeakMethod[Callable[[Sequence[SparseWeight]], None]]) -> None:
        super().__init__(weight)
        self._accept = accept

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        weight, accept = self.weight(), self._accept()
        if weight is not None and accept is not None and weight.is_trained:
            accept([weight])


class _BeforeLoading(_ModuleHook):
    """Called before a module loads its state."""

    def __init__(self, weight: MaskedWeight, name: str) -> None:
        super().__init__(weight)
        self._name = name

    def __call__(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        weight = self.weight()
        loaded = state.get(prefix + self._name)
        if weight is None or not isinstance(loaded, Tensor) or loaded.shape != weight.shape:  # load_state_dict refuses
            return
        if metadata.get("assign_to_params_buffers"):
            raise TopKastError(
                f"load_state_dict(assign=True) would replace the parameter of the sparse weight '{weight.name}', which "
                "Top-KAST and the optimizer hold; load with assign=False"
            )
        if int(weight.sharding.sum(torch.count_nonzero(~torch.isfinite(to_local(loaded))))):
            raise NonFiniteWeightError(
                f"weights with NaN or infinity were to be loaded into '{weight.name}'; load others"
            )
        weight.begin_loading()


class _AfterLoading(_ModuleHook):
    """Called after a module has loaded its state."""

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        weight = self.weight()
        if weight is not None:
            with torch.no_grad():
                weight.finish_loading()
