"""Shard the weights, the masks and the optimizer over two processes (FSDP2). Run: python examples/fsdp2.py

On GPUs: accelerator="gpu", devices=8, and precision="bf16-mixed" if you like.
"""

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_topkast import Targets, TopKastCallback


class Digits(L.LightningModule):
    """Your module; `configure_model` is where Lightning wants its weights sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))

    topkast = TopKastCallback(
        targets=Targets(keep_first_dense=False),
        update_every=25,
        forward_sparsity=0.9,
        backward_sparsity=0.8,
    )
    # the mesh has to be one of data parallelism: Lightning's default is tensor parallelism over all devices
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=5,
        callbacks=[topkast],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model := Digits(), DataLoader(data, batch_size=32, shuffle=True))

    weight = topkast.topkast.weights["net.2.weight"]
    part, whole = weight.parameter.to_local(), weight.parameter.full_tensor()  # all processes take part
    if trainer.is_global_zero:
        print(
            f"rank 0 holds {part.numel():,} of {whole.numel():,} entries of net.2.weight; "
            f"{int((whole != 0).sum()):,} are in use, {weight.active_count:,} were asked for"
        )
