"""A decoder-only transformer over bytes or words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLM(nn.Module):
    """Predict the next token, from tokens of shape (batch, time) to logits of shape (batch, time, vocabulary).

    Pre-norm blocks with causal attention and rotary positions (Su et al., 2021); every projection is an `nn.Linear`, so
    that all of them can be sparse.

    Args:
        num_classes: Size of the vocabulary; 256 for bytes.
        sequence_length: Longest sequence.
        width: Size of the embedding.
        depth: Number of blocks.
        heads: Attention heads; must divide `width`.
        feedforward: Hidden size of the feed-forward layers; None for four times `width`.
        dropout: Dropout probability after each attention and feed-forward layer.
        attention_dropout: Dropout probability of the attention weights.
        tie_output: The output layer's weights are the embedding's, which stays dense. The last candidate for sparsity
            is then the last block's, hence recipe.keep_last_dense=false in model=transformer_tied.
    """

    def __init__(
        self,
        num_classes: int,
        sequence_length: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tie_output: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or width < 2 * heads:
            raise ValueError(f"heads={heads} must divide width={width} into parts of at least 2")
        self.tokens = nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, feedforward or 4 * width, dropout, attention_dropout, sequence_length)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, num_classes, bias=False)
        if tie_output:
            self.output.weight = self.tokens.weight
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith("project.weight"):
                # Each block adds to the residual stream twice; keep its variance independent of depth (GPT-2).
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits for the token after each input token."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each added to its input."""

    def __init__(
        self, width: int, heads: int, feedforward: int, dropout: float, attention_dropout: float, sequence_length: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, attention_dropout, sequence_length)
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, feedforward, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class Attention(nn.Module):
    """Multi-head causal self-attention with `scaled_dot_product_attention` and rotary positions."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float, sequence_length: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        for name in ("cosine", "sine"):
            self.register_buffer(name, torch.empty(sequence_length, width // heads // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the tables of rotary positions."""
        pairs = self.cosine.shape[1]
        speeds = 10_000.0 ** (-torch.arange(pairs) / pairs)
        angles = torch.arange(len(self.cosine))[:, None] * speeds
        self.cosine.copy_(angles.cos())
        self.sine.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to itself and to earlier positions."""
        batch, time, width = x.shape
        q, k, v = self.query_key_value(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cosine, sine = self.cosine[:time], self.sine[:time]
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, time, width)))
        return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs of entries of x, (..., time, size), so that query-key products depend only on distance.

    `cosine` and `sine`, (time, size // 2), are of the angle by which a pair turns at a position. The last entry of an
    odd size stays as it is.
    """
    pairs = cosine.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU in between."""

    def __init__(self, width: int, inside: int, dropout: float) -> None:
        super().__init__()
        self.add_module("expand", nn.Linear(width, inside))
        self.add_module("gelu", nn.GELU())
        self.add_module("project", nn.Linear(inside, width))
        self.add_module("dropout", nn.Dropout(dropout))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
