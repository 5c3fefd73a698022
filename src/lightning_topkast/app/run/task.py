"""The training task: cross-entropy on the logits of any network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_topkast.app.data.windows import IGNORED
from lightning_topkast.app.errors import AppError

Part = Literal["train", "val", "test"]


class ClassificationTask(LightningModule):
    """Train `net` to classify: images, or the next byte at every position of a text.

    Logs `<part>/loss` and `<part>/acc` for train, val and test, and for text `<part>/bits_per_byte` or
    `<part>/perplexity`; targets of `IGNORED` are ignored. Checkpoints hold only tensors and primitives, so that they
    load with `weights_only=True`.

    Args:
        net: Network that returns logits, with the classes in the last dimension.
        optimizer: Function of the parameters, e.g. a `functools.partial` of a torch optimizer.
        scheduler: Function of the optimizer and, if it has such an argument, `total_steps`, the optimizer steps of the
            run; stepped after every optimizer step. None keeps the learning rate.
        num_classes: Number of classes.
        label_smoothing: Label smoothing of the training loss.
        bits_per_byte: Also log the loss in bits, the usual metric for text as bytes.
        perplexity: Also log the exponential of the mean loss, the usual metric for text as words.
        channels_last: Use this memory format for the weights and images of a network with 2-D convolutions.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., Any] | None = None,
        *,
        num_classes: int | None,
        label_smoothing: float = 0.0,
        bits_per_byte: bool = False,
        perplexity: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if num_classes is None:
            raise AppError("the number of classes is not known: set task.num_classes=10")
        self.net = net
        self.channels_last = channels_last and any(isinstance(module, nn.Conv2d) for module in net.modules())
        if self.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.accuracy = _one_per_part(lambda: MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED))
        self.text_figures = nn.ModuleDict()
        if bits_per_byte:
            self.text_figures["bits_per_byte"] = _one_per_part(BitsPerByte)
        if perplexity:
            self.text_figures["perplexity"] = _one_per_part(Perplexity)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's logits."""
        if self.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(inputs)
        return logits

    def configure_model(self) -> None:
        """Shard the network over the processes if the strategy has a device mesh (FSDP2)."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.net, FSDPModule):  # Lightning calls this hook again for test()
            return
        if self.channels_last:  # fully_shard needs contiguous parameters; images keep their format
            self.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        mesh = self.device_mesh["data_parallel"]
        # Each block is gathered and freed on its own; the root holds the rest.
        for block in _outermost_blocks(self.net):
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, with label smoothing."""
        return self._step(batch, "train", self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the metrics of a validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the metrics of a test batch."""
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the classes with the largest logits."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the scheduler over the number of steps of the run."""
        try:
            optimizer = self.optimizer(self.parameters())
        except (ValueError, TypeError) as error:  # torch checks the learning rate and other arguments
            raise AppError(f"optimizer: {error}") from error
        if self.scheduler is None:
            return optimizer
        options: dict[str, Any] = {}
        if "total_steps" in inspect.signature(self.scheduler).parameters:
            steps = self.trainer.estimated_stepping_batches
            if math.isinf(steps):
                raise AppError("the scheduler needs a run of known length: set trainer.max_epochs or trainer.max_steps")
            options["total_steps"] = int(steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer, **options), "interval": "step"},
        }

    def _step(self, batch: tuple[Tensor, Tensor], part: Part, label_smoothing: float = 0.0) -> Tensor:
        inputs, targets = batch
        logits = self(inputs)
        # Text has a target at every position.
        logits, targets = logits.flatten(0, -2), targets.flatten()
        # Training has no ignored targets, and need not wait for the device to count them.
        count = len(targets) if part == "train" else int((targets != IGNORED).sum())
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing) if count else logits.new_zeros(())
        accuracy = cast(Metric, self.accuracy[_metric_name(part)])
        accuracy(logits.detach(), targets)
        # Training curves show single steps, the others the mean of an epoch.
        self.log(f"{part}/loss", loss, prog_bar=part == "train", batch_size=count, sync_dist=part != "train")
        self.log(f"{part}/acc", accuracy, prog_bar=part == "val", batch_size=count)
        if self.text_figures:
            plain = F.cross_entropy(logits.detach(), targets) if label_smoothing else loss.detach()
            for name, parts in self.text_figures.items():
                figure = cast(Metric, cast(nn.ModuleDict, parts)[_metric_name(part)])
                figure(plain, weight=count)
                self.log(f"{part}/{name}", figure, prog_bar=part == "val", batch_size=count)
        return loss


class BitsPerByte(MeanMetric):
    """The mean loss per byte, in bits."""

    def compute(self) -> Tensor:
        """Return the mean over all processes."""
        return super().compute() / math.log(2.0)


class Perplexity(MeanMetric):
    """The exponential of the mean loss per token.

    That of torchmetrics converts logits to probabilities, which takes gigabytes with a vocabulary of words.
    """

    def compute(self) -> Tensor:
        """Return the exponential of the mean over all processes."""
        return super().compute().exp()


def _outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the module lists in `module`, such as the blocks of a transformer or a ResNet."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child
        else:
            yield from _outermost_blocks(child)


def _metric_name(part: Part) -> str:
    return f"{part}_metric"  # "train" would shadow a method of the module


def _one_per_part(metric: Callable[[], Metric]) -> nn.ModuleDict:
    parts: tuple[Part, ...] = ("train", "val", "test")
    return nn.ModuleDict({_metric_name(part): metric() for part in parts})
