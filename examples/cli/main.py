"""LightningCLI builds the callback from YAML. Run: python examples/cli/main.py fit --config examples/cli/config.yaml

Needs jsonargparse: pip install 'lightning-topkast[examples]'.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    """A small network with its width as an argument."""

    def __init__(self, width: int = 200, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """1,797 hand-written digits of 8×8 pixels, from scikit-learn."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True)


if __name__ == "__main__":
    cli = LightningCLI(Classifier, Digits, save_config_callback=None)
    if cli.subcommand == "fit":
        weight = cli.model.net[2].weight
        loss = float(cli.trainer.callback_metrics["loss"])
        print(f"training loss {loss:.3f} with {float((weight != 0).float().mean()):.1%} of net.2.weight in use")
