"""Noticing what other code does to sparse weights: optimizers that step on them, and weights that are loaded."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_topkast.errors import TopKastError
from lightning_topkast.weights import SparseWeight


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


def watch_loading(weight: SparseWeight, owners: Sequence[tuple[nn.Module, str]]) -> list[RemovableHandle]:
    """Let `load_state_dict` of a weight's modules announce that it is about to load the weight."""
    return [module.register_load_state_dict_pre_hook(_BeforeLoading(weight, name)) for module, name in owners]


class _BeforeLoading:
    """A hook on a module's `load_state_dict`; copied or pickled with the module, it becomes one that does nothing."""

    def __init__(self, weight: SparseWeight, name: str) -> None:
        self._weight, self._name = ref(weight), name

    def __call__(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        weight = self._weight()
        loaded = state.get(prefix + self._name)
        if weight is None or getattr(loaded, "shape", None) != weight.shape:  # which load_state_dict refuses
            return
        if metadata.get("assign_to_params_buffers"):
            raise TopKastError(
                f"load_state_dict(assign=True) would replace the parameter of the sparse weight '{weight.name}', which "
                "Top-KAST and the optimizer hold; load with assign=False"
            )
        weight.begin_loading()

    def __reduce__(self) -> Any:
        return partial, (chain,)  # takes any arguments and needs nothing of this package
