"""Compressing a stage's update to low rank.

`weight` truncates the singular value decomposition of the update itself (paper Eq. 3): the best rank-r matrix in the
Frobenius norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame_moe.nn.stacked import Factorise, LowRank, Slice


def by_weight(rank: int | None) -> Factorise:
    """Truncated SVD to `rank` (Eq. 3), singular values folded into the left factor.

    Args:
        rank: r per matrix; None keeps the update as it is. A slice that would cost at least as much as the dense
            update, r (out + in) >= out * in, is stored dense, exactly.
    """

    def factorise(delta: Tensor) -> Slice:
        out, width = delta.shape[-2:]
        if rank is None or rank >= min(out, width) or rank * (out + width) >= out * width:
            return delta
        if rank == 0:
            return None
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        a = u[..., :, :rank] * s[..., None, :rank]
        return LowRank(a.to(delta.dtype), vh[..., :rank, :].to(delta.dtype))

    return factorise
