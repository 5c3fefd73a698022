"""Multi-head self-attention with packed projection weights."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_topkast.layers.products import ProductLayer


class ProductAttention(ProductLayer):
    """`nn.MultiheadAttention` with a packed `in_proj_weight`.

    Attention between different sequences, or with `bias_k`/`bias_v` or `add_zero_attn`, computes with the dense α.
    """

    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    in_proj_bias: Tensor | None
    out_proj: torch.nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same as `nn.MultiheadAttention.forward`."""
        own = query is key and key is value and query.dim() in (2, 3)
        if not own or self.bias_k is not None or self.add_zero_attn or (is_causal and attn_mask is None):
            result = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return cast(tuple[Tensor, Tensor | None], result)
        batched, batch_first = query.dim() == 3, self.batch_first
        x = query if batched and batch_first else query.transpose(0, 1) if batched else query.unsqueeze(0)
        batch, length, width = x.shape
        projected = self._product(x, "in_proj_weight", self.in_proj_bias)
        q, k, v = projected.view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)

        mask = self._mask(key_padding_mask, attn_mask, batch, length, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / (width // self.num_heads) ** 0.5
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        out = out if batched and batch_first else out.transpose(0, 1) if batched else out.squeeze(0)
        return out, weights

    def _mask(
        self, key_padding: Tensor | None, attention: Tensor | None, batch: int, length: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return both masks as one tensor that is added to the scores (batch, heads, length, length)."""
        mask = _added(attention, dtype)
        if mask is not None:
            mask = mask.view(batch, self.num_heads, length, length) if mask.dim() == 3 else mask
        padding = _added(key_padding, dtype)
        if padding is not None:
            padding = padding.view(batch, 1, 1, length)
            mask = padding if mask is None else mask + padding
        return mask


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the additive mask for a bool mask, which is true where attention is not allowed."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
