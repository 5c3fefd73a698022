"""A training step that a CUDA graph takes, while the method goes on around it."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_topkast.engine import cuda_graph
from lightning_topkast.engine.attached import Attached
from lightning_topkast.engine.step_hooks import StepHooks
from lightning_topkast.errors import TopKastError

_WARM_UP = 3  # steps before the first capture, as PyTorch advises; kernels are tuned in them


class CapturedStep:
    """A training step that is captured in a CUDA graph and then replayed; `TopKast.capture` makes it.

    Each call takes one step. The first ones are taken by `step` itself, as are all on a device without CUDA graphs, and
    the step before a refresh if the rule needs its gradients (RigL). Around each replay the engine does its part: it
    counts the step and refreshes the sets, in the same memory. After a change of what the graph holds fixed (numbers in
    the groups of attached optimizers, the memory of parameters and state, which parameters are trained, the sizes of
    the sets) one step is taken by `step`, and the next one is captured again.

    Args:
        attached: the engine's optimizers.
        step: as in `TopKast.capture`.
    """

    def __init__(self, attached: Attached, step: Callable[[], Any]) -> None:
        self._attached = attached
        self._step = step
        self._graph: cuda_graph.CudaGraph | None = None
        self._updates: list[bool] = []  # whether the captured step updates weights of each attached optimizer
        self._result: Any = None
        self._fixed: Any = None  # what the graph holds fixed
        self._numbers: dict[tuple[int, int, str], Any] = {}  # those of the groups
        self._eager = _WARM_UP  # steps to take before it is captured
        self._warned = False

    def __call__(self) -> Any:
        """Take one step and return what `step` returns; tensors in it are overwritten by the next call.

        Raises:
            TopKastError: the engine is no longer attached, or the step cannot be captured.
        """
        hooks = list(self._attached)
        weights = [weight for each in hooks for weight in each.weights]
        if not hooks:
            raise TopKastError(
                "the engine of this captured step is no longer attached to an optimizer: another TopKast has taken its "
                "weights, or detach() or release() was called; call capture() of the one that trains the model now"
            )
        if not weights or not all(cuda_graph.CudaGraph.supports(weight.parameter) for weight in weights):
            return self._step()
        if self._graph is None:
            self._graph = cuda_graph.CudaGraph()
        for each in hooks:
            each.before_replay()
        fixed = [_fixed_by(each) for each in hooks]
        if fixed != self._fixed:
            self._look_at_numbers(hooks)
            self._updates, self._result, self._fixed = [], None, fixed
            self._eager = max(self._eager, 1)  # which tunes kernels for other sizes
        if self._eager or any(each.needs_gradients for each in hooks):
            self._eager = max(self._eager - 1, 0)
            return self._graph.warm_up(self._step)
        if not self._updates:
            self._result, self._updates = self._capture(self._graph, hooks)
        self._graph.replay()
        for each, updates in zip(hooks, self._updates, strict=True):
            each.after_replay(updates)
        return self._result

    def _capture(self, graph: cuda_graph.CudaGraph, hooks: list[StepHooks]) -> tuple[Any, list[bool]]:
        taken: list[list[bool]] = [[] for _ in hooks]
        for each, steps in zip(hooks, taken, strict=True):
            each.captured = steps
        try:
            result = graph.capture(self._step)
            for each, steps in zip(hooks, taken, strict=True):
                if len(steps) != 1:
                    raise TopKastError(
                        "a captured function must take one step of every attached optimizer at each call; this one "
                        f"took {len(steps)} of {type(each.optimizers[0]).__name__}"
                    )
        except BaseException as error:
            for each in hooks:
                each.abandon_step()
            if not isinstance(error, RuntimeError):
                raise
            raise TopKastError(
                f"the step cannot be captured in a CUDA graph: {error}\nIt must not read values of the device, such as "
                "loss.item(), and needs optimizers that can be captured, such as Adam(..., capturable=True)"
            ) from error
        finally:
            for each in hooks:
                each.captured = None
        return result, [updates for (updates,) in taken]

    def _look_at_numbers(self, hooks: list[StepHooks]) -> None:
        """Warn once if a number of a group has changed."""
        numbers = {
            (at, number, name): value
            for at, each in enumerate(hooks)
            for number, group in enumerate(each.optimizers[0].param_groups)
            for name, value in group.items()
            if isinstance(value, int | float)
        }
        changed = [key for key, old in self._numbers.items() if numbers.get(key, old) != old]
        if changed and not self._warned:
            self._warned = True
            name, old, new = changed[0][2], self._numbers[changed[0]], numbers[changed[0]]
            warnings.warn(
                f"the optimizer's {name} has changed from {old} to {new}. A captured step holds numbers fixed, so each "
                f"change costs a step that is not replayed, and another capture; if it is often, make it a tensor: "
                f"{name}=torch.tensor({old}, device='cuda')",
                stacklevel=3,
            )
        self._numbers = numbers


def _fixed_by(hooks: StepHooks) -> Any:
    """Return what a captured step holds fixed: numbers, and addresses of what it reads and writes."""
    groups = [
        {name: _fixed(value) for name, value in group.items()}
        | {
            "trained": [
                (parameter.requires_grad, _state(optimizer.state.get(parameter))) for parameter in group["params"]
            ]
        }
        for optimizer in hooks.optimizers
        for group in optimizer.param_groups
    ]
    return groups, [weight.fixed for weight in hooks.weights]


def _state(state: Any) -> Any:
    return {name: _fixed(value) for name, value in state.items()} if state else None


def _fixed(value: Any) -> Any:
    """Return the address of a tensor, and other values themselves."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return [_fixed(each) for each in value] if isinstance(value, list | tuple) else value
