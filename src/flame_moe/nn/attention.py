"""Self-attention over the steps of one modality, with padding masked out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.dropout import dropout
from flame_moe.nn.layers import StackedLinear


class SelfAttention(nn.Module):
    """Multi-head self-attention, (n, T, d) -> (n, T, d); packed query/key/value map, Xavier-uniform.

    Args:
        width: d, a multiple of heads.
        heads: number of heads.
        dropout: rate on the attention weights.
        stage: the stage in which it is trained first.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, stage: int) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.inputs = StackedLinear(width, 3 * width, stage=stage, bound=math.sqrt(6 / (4 * width)))
        self.output = StackedLinear(width, width, stage=stage, bound=math.sqrt(6 / (2 * width)))

    def forward(self, x: Tensor, mask: Tensor, cursor: int) -> Tensor:
        """mask (n, T) bool: padding is no key; what a padded query gets is of no use."""
        n, steps, width = x.shape
        packed = self.inputs(x, cursor, mask)
        if steps == 1:
            return self.output(packed[..., 2 * width :], cursor, mask)
        apart = packed.view(n, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.training and self.dropout:
            q, k, v = apart.reshape(3, n * self.heads, steps, -1).unbind(0)
            z = _attend(q, k, v, mask, self.dropout).view(n, self.heads, steps, -1)
        else:
            q, k, v = apart.unbind(0)
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.output(z.transpose(1, 2).reshape(n, steps, width), cursor, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rate: float) -> Tensor:
    """Scaled dot-product attention with dropout on the weights; the fused kernels of CPUs have none.

    Args:
        q, k, v: (n heads, T, d_h).
        mask: (n, T) bool, which keys exist.
        rate: of dropout.
    """
    steps, heads = q.shape[1], len(q) // len(mask)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    bias = bias.repeat_interleave(heads, dim=0)[:, None, :].expand(-1, steps, -1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=1.0 / math.sqrt(q.shape[-1]))
    return torch.bmm(dropout(torch.softmax(scores, dim=-1), rate), v)


def positions(steps: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position code, (steps, width)."""
    place = torch.arange(steps, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(1)[:, :width]
