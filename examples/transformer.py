"""A GPT-2 from transformers, whose layers are not nn.Linear. Run: python examples/transformer.py

Needs the extra `text`. The weights are random and the text is made up, so nothing is downloaded.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_topkast import Targets, TopKastCallback

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


class LanguageModel(L.LightningModule):
    """Next-byte prediction with a small GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        )

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    data = torch.tensor(list(TEXT.encode()))
    windows = data[: len(data) // 64 * 64].view(-1, 64)

    # GPT-2 computes with its own Conv1D, so name the type; the embedding, which is the output layer too, stays dense.
    topkast = TopKastCallback(
        0.8,
        0.5,
        targets=Targets(include_types=["Conv1D"], keep_first_dense=False, keep_last_dense=False),
        update_every=20,
    )
    trainer = L.Trainer(max_epochs=6, callbacks=[topkast], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(LanguageModel(), DataLoader(windows, batch_size=16, shuffle=True))

    sparsities = [1 - weight.forward_density for weight in topkast.topkast.weights.values()]
    print(f"loss {trainer.callback_metrics['loss']:.3f}, {len(sparsities)} weights at sparsity {min(sparsities):.3f}")
