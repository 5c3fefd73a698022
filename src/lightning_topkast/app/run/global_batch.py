"""Keep the number of examples per step the same on any number of processes, by accumulating gradients."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from lightning_topkast.app.errors import AppError


class GlobalBatch(Callback):
    """Set `accumulate_grad_batches` of the Trainer so that a step sees `size` examples.

    Args:
        size: Examples per step, over all processes.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it once the number of processes is known, and before the schedule needs the number of steps."""
        if stage != "fit":
            return
        batch_size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if batch_size is None:
            raise AppError(f"recipe.global_batch={self.size} needs data with a batch_size")
        accumulate = accumulation(self.size, batch_size, trainer.world_size)
        if trainer.accumulate_grad_batches not in (1, accumulate):
            raise AppError(
                f"recipe.global_batch={self.size} needs {accumulate} batches per step, but "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: set one of them only"
            )
        trainer.accumulate_grad_batches = accumulate


def accumulation(size: int, batch_size: int, processes: int) -> int:
    """Return the number of batches of each process in a step of `size` examples.

    Raises:
        AppError: It is not an integer; the message suggests a batch size.
    """
    if not isinstance(size, int) or size < 1:
        raise AppError(f"recipe.global_batch={size} is not valid: expected an int of at least 1, or null")
    accumulate, rest = divmod(size, batch_size * processes)
    if rest == 0:
        return accumulate
    share, rest = divmod(size, processes)
    way = (
        f"data.batch_size={max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)} would be"
        if share and not rest
        else "another number of processes"
    )
    raise AppError(
        f"recipe.global_batch={size} is not a multiple of data.batch_size={batch_size} on {processes} "
        f"process{'es' if processes > 1 else ''}: {way}"
    )
