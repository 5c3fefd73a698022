"""A user's own LightningModule, which the application is to take as it is."""

import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn


class OwnModule(BoringModel):
    """Has an ordinary configure_optimizers, metrics of its own, and an attribute named as one of the application's."""

    optimizer = "sgd"

    def __init__(self, token: str = "", nested: dict[str, str] | None = None, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("own/loss", super().validation_step(batch[0], batch_idx)["x"])

    def test_step(self, batch, batch_idx):
        return super().test_step(batch[0], batch_idx)

    def configure_optimizers(self):
        if self.hparams.token:
            print("the module has", self.hparams.token)
        return torch.optim.Adam(self.parameters(), lr=0.01)
