"""Masked pooling of a sequence into one vector."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def temporal_attention_pool(x: Tensor, mask: Tensor, query: Tensor) -> Tensor:
    """Temporal attention pooling, paper Eq. (1): w_t = softmax_t(x_t . q / sqrt(d)), result sum_t w_t x_t.

    Args:
        x: (n, T, d).
        mask: (n, T) bool, at least one true per row; padding gets weight exactly 0.
        query: (d,).

    Returns:
        (n, d). With T = 1 this is the identity.
    """
    if x.shape[1] == 1:
        return x[:, 0]
    scores = (x @ query) / math.sqrt(x.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=1)
    return torch.bmm(weights[:, None, :], x)[:, 0]


def last_step(x: Tensor, mask: Tensor, query: Tensor | None = None) -> Tensor:
    """The last step that exists: (n, T, d) -> (n, d). `query` is not read."""
    last = (mask * torch.arange(mask.shape[1], device=x.device)).amax(dim=1)
    return x[torch.arange(len(x), device=x.device), last]


def masked_mean(x: Tensor, mask: Tensor, query: Tensor | None = None) -> Tensor:
    """Mean over the steps that exist: (n, T, d) -> (n, d). `query` is not read."""
    weights = mask.to(x.dtype) / mask.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None, :], x)[:, 0]


def attention(x: Tensor, mask: Tensor, query: Tensor | None = None) -> Tensor:
    """`temporal_attention_pool` as a read-out; needs a query."""
    if query is None:
        raise ValueError("attention read-out needs a query")
    return temporal_attention_pool(x, mask, query)


READOUTS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "last": last_step,
    "mean": masked_mean,
    "attention": attention,
}
