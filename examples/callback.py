"""Add one callback to your own LightningModule and the network is sparse. Run: python examples/callback.py"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_topkast import Targets, TopKastCallback


class Digits(L.LightningModule):
    """Your module, as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(dim=1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [1500, 297])

    topkast = TopKastCallback(
        targets=Targets(keep_first_dense=False),
        update_every=25,
        forward_sparsity=0.9,
        backward_sparsity=0.8,
    )
    trainer = L.Trainer(max_epochs=15, callbacks=[topkast], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model := Digits(), DataLoader(train, batch_size=64, shuffle=True))
    (result,) = trainer.test(model, DataLoader(test, batch_size=297))

    weight = model.net[2].weight
    print(f"accuracy {result['accuracy']:.3f} with {float((weight != 0).float().mean()):.1%} of net.2.weight in use")
