"""Self-attention over the steps of one modality, with padding masked out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.stacked import StackedLinear


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
        q, k, v = packed.view(n, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=rate)
        return self.output(z.transpose(1, 2).reshape(n, steps, width), cursor, mask)


def positions(steps: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position code, (steps, width)."""
    place = torch.arange(steps, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(1)[:, :width]
