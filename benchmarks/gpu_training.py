"""A model in training with Adam, dense or packed by blocks, and the ways in which Python can launch its step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from gpu_timing import Call, in_a_line, medians
from tables import Row
from torch import Tensor, nn
from torch.optim import Adam

from lightning_topkast import Packed, Targets, TopKast
from lightning_topkast.engine.cuda_graph import CudaGraph
from lightning_topkast.method import structure

Forward = Callable[[Tensor], Tensor]


class Training:
    """A model in training on one input, whose shape its output has; with a pair of sparsities it is packed.

    Args:
        x: bfloat16; it gets a gradient, if it requires one.
        block: the side of packed blocks.
    """

    def __init__(self, model: nn.Module, x: Tensor, pair: tuple[float, float] | None = None, block: int = 0) -> None:
        self.model, self.x, self.topkast = model, x, None
        if pair is not None:
            self.topkast = TopKast(
                model,
                *pair,
                targets=Targets(keep_first_dense=False, keep_last_dense=False),
                update_every=10**6,
                structure=structure.Block(block, block),
                storage=Packed(kernels="auto" if x.is_cuda else "torch"),  # no rehearsal waits for a compiler
            )
        self.optimizer = Adam(model.parameters(), lr=1e-4, fused=True, capturable=x.is_cuda)
        if self.topkast is not None:
            self.topkast.attach(self.optimizer)

    def step(self, forward: Forward | None = None) -> None:
        """One step, by the model itself or by what was compiled from it."""
        self.clear()
        (self.model if forward is None else forward)(self.x).backward(self.x.detach())
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self.x.grad = None

    def compiled(self) -> Forward:
        """The model as torch.compile makes it, as one graph, for these sizes alone."""
        torch._dynamo.config.recompile_limit = 64  # each training has a graph, more than are allowed one piece of code
        compiled: Forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        return compiled

    def captured(self, forward: Forward) -> Call:
        """A step as a CUDA graph; of a packed model with what the engine does on the host around each replay."""
        if not CudaGraph.supports(self.x):
            raise RuntimeError("CUDA graphs need a GPU")
        step = partial(self.step, forward)
        if self.topkast is None:
            graph = CudaGraph()
            for _ in range(3):
                graph.warm_up(step)
            self.clear()
            graph.capture(step)
            call: Call = graph.replay
        else:
            call = self.topkast.capture(step)
            for _ in range(4):  # the last one captures
                call()
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        call()
        moved = (not torch.equal(old, new) for old, new in zip(before, self.model.parameters(), strict=True))
        assert any(moved), "a replay changes no parameter"
        return call

    def tensors(self) -> Iterable[Tensor]:
        """Weights, gradients and Adam's state."""
        for parameter in self.model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Ways:
    """A step's calls by the way in which it is launched, warmed up; and why others can't be."""

    calls: dict[str, Call]
    failures: dict[str, str]


def ways(training: Training) -> Ways:
    """Eager, compiled, and either captured; those that work."""
    found = Ways({}, {})
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: training.step,
        "compiled": lambda: partial(training.step, training.compiled()),
        "captured": lambda: training.captured(training.model),
        "compiled, captured": lambda: training.captured(training.compiled()),
    }
    for name, make in makers.items():
        try:
            call = make()
            for _ in range(3):  # the first ones compile and tune
                call()
            if training.x.is_cuda:
                torch.cuda.synchronize()
            found.calls[name] = call
        except Exception as error:  # it may fail in any way, and then says so in its row
            found.failures[name] = in_a_line(error)
    return found


def launched(dense: Ways, sparse: Ways, device: torch.device, rounds: int) -> Row:
    """Milliseconds of steps as Python launches them, in turn, and the best way of one over that of the other."""
    kinds = {"dense": dense, "sparse": sparse}
    calls = {f"{way} {kind}": call for kind, each in kinds.items() for way, call in each.calls.items()}
    found = medians(calls, device, rounds, queued=False)
    row: Row = {f"{name} ms": ms for name, ms in found.items()}
    row |= {f"{way} {kind} failed": text for kind, each in kinds.items() for way, text in each.failures.items()}
    for kind in kinds:
        row[f"best {kind} ms"] = min(ms for name, ms in found.items() if name.endswith(kind))
    row["from Python"] = row["best dense ms"] / row["best sparse ms"]
    return row
