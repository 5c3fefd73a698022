"""The ways to train a workload that are compared: dense, ours, and two rivals."""

from collections.abc import Iterable
from time import process_time

import torch
from torch import Tensor
from torch.nn import functional as F
from workloads import Batch, Workload

from lightning_topkast import Targets, TopKast

FORWARD, BACKWARD, EVERY = 0.9, 0.8, 100


class Dense:
    """The plain step, and what all variants share."""

    name = "dense"

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.workload = workload
        self.model = workload.build()
        self.steps = 0
        self.prepare()

    def prepare(self) -> None:
        self.optimizer = self.workload.optimizer(self.model.parameters())

    def backward(self, batch: Batch) -> None:
        inputs, targets = batch
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten()).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def step(self, batch: Batch) -> tuple[float, float]:
        """Train one step; return its seconds and those of the optimizer with everything around it."""
        start = process_time()
        self.backward(batch)
        middle = process_time()
        self.update()
        end = process_time()
        return end - start, end - middle

    def refresh(self, batch: Batch) -> float | None:
        """Choose the masks again; return the seconds, or None where there are none."""
        return None

    def extra_tensors(self) -> Iterable[Tensor]:
        """What is held between steps beyond the dense step's parameters and optimizer state."""
        return ()

    def sparse_entries(self) -> int:
        return 0


class DenseAgain(Dense):
    """A second dense step: how far its ratio is from 1 is the noise of this run."""

    name = "dense again"


class Masked(Dense):
    """Top-KAST in masked mode."""

    name = "masked"

    def prepare(self) -> None:
        self.topkast = TopKast(
            self.model,
            FORWARD,
            BACKWARD,
            targets=Targets(keep_first_dense=self.workload.keep_first_dense),
            update_every=EVERY,
        )
        super().prepare()
        self.topkast.attach(self.optimizer)  # with no hooks beside ours: for them a step would take several passes

    def refresh(self, batch: Batch) -> float | None:
        start = process_time()
        self.topkast.refresh()
        return process_time() - start

    def extra_tensors(self) -> Iterable[Tensor]:
        for weight in self.topkast.weights.values():
            for value in vars(weight).values():
                if isinstance(value, Tensor) and value is not weight.parameter:
                    yield value

    def sparse_entries(self) -> int:
        return sum(weight.parameter.numel() for weight in self.topkast.weights.values())


class RigLTorch(Dense):
    """`rigl-torch`, which takes every layer with a `weight` but the first and batch norms."""

    name = "rigl-torch"

    def prepare(self) -> None:
        from rigl_torch.RigL import RigLScheduler

        super().prepare()
        self.rigl = RigLScheduler(
            self.model,
            self.optimizer,
            dense_allocation=1 - FORWARD,
            ignore_linear_layers=False,
            delta=EVERY,
            T_end=10**6,
        )

    def update(self) -> None:
        if self.rigl():  # as its README has it: no optimizer step when the masks change
            self.optimizer.step()
        self.steps += 1

    def refresh(self, batch: Batch) -> float | None:
        self.rigl.step = self.rigl.step // EVERY * EVERY + EVERY - 1  # the next gradient is kept for growing
        self.backward(batch)
        start = process_time()
        self.rigl()
        return process_time() - start

    def extra_tensors(self) -> Iterable[Tensor]:
        return (mask for mask in self.rigl.backward_masks if mask is not None)

    def sparse_entries(self) -> int:
        return sum(mask.numel() for mask in self.extra_tensors())


class WeightNorm(Dense):
    """`torch.ao.pruning.WeightNormSparsifier` on single entries of the weights that Top-KAST makes sparse."""

    name = "WeightNormSparsifier"

    def prepare(self) -> None:
        from torch.ao.pruning import WeightNormSparsifier

        weights = TopKast(
            self.workload.build(), FORWARD, BACKWARD, targets=Targets(keep_first_dense=self.workload.keep_first_dense)
        ).weights
        self.sparsifier = WeightNormSparsifier(sparsity_level=FORWARD, sparse_block_shape=(1, 1))
        self.sparsifier.prepare(self.model, [{"tensor_fqn": name} for name in weights])
        super().prepare()

    def update(self) -> None:
        super().update()
        if self.steps % EVERY == 1:
            self.sparsifier.step()

    def refresh(self, batch: Batch) -> float | None:
        start = process_time()
        self.sparsifier.step()
        return process_time() - start

    def extra_tensors(self) -> Iterable[Tensor]:
        return (mask for name, mask in self.model.named_buffers() if name.endswith(".mask"))

    def sparse_entries(self) -> int:
        return sum(mask.numel() for mask in self.extra_tensors())


VARIANTS = {variant.name: variant for variant in (Dense, DenseAgain, Masked, RigLTorch, WeightNorm)}
