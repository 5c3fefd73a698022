"""A training step that a CUDA graph takes, while the method goes on around it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_topkast.engine.attached import Attached
from lightning_topkast.errors import TopKastError

_WARM_UP = 3  # steps before the first capture, as PyTorch advises; kernels are tuned in them


class CapturedStep:
    """A training step that is captured in a CUDA graph and then replayed; `TopKast.capture` makes it.

    Each call takes one step. The first ones are taken by `step` itself, as are all on a device without CUDA graphs, and
    the step before a refresh if the rule needs its gradients (RigL). Around each replay the engine does its part: it
    counts the step and refreshes the sets, in the same memory. The graph is captured again if something that it holds
    fixed has changed: a number in the optimizer's groups, the sizes of the sets, or the memory of a parameter.

    Args:
        attached: the engine's optimizers.
        step: as in `TopKast.capture`.
    """

    def __init__(self, attached: Attached, step: Callable[[], Any]) -> None:
        self._attached = attached
        self._step = step
        self._graph: CudaGraph | None = None
        self._result: Any = None
        self._held: tuple[Any, ...] | None = None  # what the graph holds fixed
        self._eager = _WARM_UP  # steps to take before it is captured
        self._warned = False

    def __call__(self) -> Any:
        """Take one step and return what `step` returns; tensors in it are overwritten by the next call.

        Raises:
            TopKastError: the step cannot be captured.
        """
        if not all(CudaGraph.supports(weight.parameter) for hooks in self._attached for weight in hooks.weights):
            return self._step()
        held = tuple(map(_held_by, self._attached))
        if held != self._held:
            self._warn_of_numbers(held)
            self._graph, self._result, self._held = None, None, held
            self._eager = max(self._eager, 1)  # which tunes kernels for other sizes
        if self._eager or any(hooks.needs_gradients for hooks in self._attached):
            self._eager = max(self._eager - 1, 0)
            return CudaGraph.warm_up(self._step)
        for hooks in self._attached:
            hooks.before_replay()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        for hooks in self._attached:
            hooks.after_replay()
        return self._result

    def _capture(self) -> "CudaGraph":
        graph = CudaGraph()
        for hooks in self._attached:
            hooks.is_capturing = True
        try:
            self._result = graph.capture(self._step)
        except BaseException as error:
            for hooks in self._attached:
                hooks.abandon_step()
            if not isinstance(error, RuntimeError):
                raise
            raise TopKastError(
                f"the step cannot be captured in a CUDA graph: {error}\nIt must not read values of the device, such as "
                "loss.item(), and needs optimizers that can be captured, such as Adam(..., capturable=True)"
            ) from error
        finally:
            for hooks in self._attached:
                hooks.is_capturing = False
        return graph

    def _warn_of_numbers(self, held: tuple[Any, ...]) -> None:
        if self._graph is None or self._warned:
            return
        changed = {
            name: (old, new)
            for before, after in zip(self._held or (), held, strict=False)
            for group, now in zip(before[0], after[0], strict=False)
            for (name, old), (_, new) in zip(group, now, strict=False)
            if old != new and name != "params"
        }
        if changed:
            self._warned = True
            name, (old, new) = next(iter(changed.items()))
            warnings.warn(
                f"the optimizer's {name} has changed from {old} to {new}. A captured step holds numbers fixed, so it "
                f"is captured again at every change; make it a tensor if that is often: {name}=torch.tensor({old}, "
                "device='cuda')",
                stacklevel=3,
            )


class CudaGraph:
    """A CUDA graph of one function."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    def supports(tensor: Tensor) -> bool:
        """Return whether work on a tensor can be captured."""
        return tensor.is_cuda

    @staticmethod
    def warm_up(function: Callable[[], Any]) -> Any:
        """Call the function on another stream, as PyTorch demands before a capture, and return its result."""
        stream, own = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            result = function()
        own.wait_stream(stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        """Record what the function does and return its result, whose tensors are computed by `replay`."""
        failure = None
        try:
            with torch.cuda.graph(self._graph):
                try:
                    return function()
                except BaseException as error:
                    failure = error
                    raise
        except Exception as error:  # the end of a capture that has failed raises too, and says less
            raise failure or error from None

    def replay(self) -> None:
        """Do what was recorded."""
        self._graph.replay()


def _held_by(hooks: Any) -> tuple[Any, ...]:
    """Return what a captured step holds fixed: numbers and addresses."""
    groups = [group for optimizer in hooks.optimizers for group in optimizer.param_groups]
    numbers = tuple(tuple((name, _fixed(value)) for name, value in group.items()) for group in groups)
    return numbers, tuple(weight.held for weight in hooks.weights)


def _fixed(value: Any) -> Any:
    """Return the address of a tensor, and other values themselves."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(_fixed, value)) if isinstance(value, list | tuple) else value
