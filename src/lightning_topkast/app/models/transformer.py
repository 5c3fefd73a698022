"""A small decoder-only transformer over bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLM(nn.Module):
    """Predict the next byte: tokens of shape (batch, time) to logits of shape (batch, time, vocabulary).

    Pre-norm blocks with causal attention; every projection is an `nn.Linear`, so that all of them can be sparse.

    Args:
        num_classes: Size of the vocabulary; 256 for bytes.
        sequence_length: Longest sequence, the size of the table of positions.
        width: Size of the embedding.
        depth: Number of blocks.
        heads: Attention heads; must divide `width`.
        dropout: Probability after each attention and feed-forward part.
    """

    def __init__(
        self,
        num_classes: int,
        sequence_length: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        self.tokens = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_classes, bias=False)
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith("project.weight"):
                # Each block adds to the residual stream twice; keep its variance independent of depth (GPT-2).
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for the byte after each given one."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[-1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, time, width) for (batch, time, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class Attention(nn.Module):
    """Multi-head causal self-attention through `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position look at itself and at earlier ones."""
        batch, time, width = x.shape
        q, k, v = self.query_key_value(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, time, width)))
        return out


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.add_module("expand", nn.Linear(width, 4 * width))
        self.add_module("gelu", nn.GELU())
        self.add_module("project", nn.Linear(4 * width, width))
        self.add_module("dropout", nn.Dropout(dropout))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
