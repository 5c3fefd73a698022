"""Packed weights over two processes (FSDP2): nothing dense on either. Run: python examples/fsdp2_packed.py

On GPUs: accelerator="gpu", devices=8, and blocks (structure=Block(128, 128)) of layers that are much wider.
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
    """Your module: it builds its layers in `__init__`, where they are packed, and shards them in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):  # each process will draw its own rows
            self.net = nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 10))

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
        forward_sparsity=0.95,
        backward_sparsity=0.9,
        targets=Targets(keep_first_dense=False),
        update_every=25,
        storage="packed",
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=5,
        callbacks=[topkast],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True))

    weight = topkast.topkast.weights["net.2.weight"]
    values, theta = weight.parameter.to_local(), weight.theta().to_local()
    if trainer.is_global_zero:
        print(
            f"of the {weight.size:,} entries of net.2.weight rank 0 holds {values.numel():,} values of the updated set "
            f"on its device, with their gradients and Adam's state, and {theta.numel():,} in host memory"
        )
