"""Router of one modality as published: attention pooling over time, noisy top-k, dense gates with zeros.

Shape suffixes: T steps, n sequences, d width, E experts, K selected. Everything is time first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions.normal import Normal


class TemporalPool(nn.Module):
    """w_t = softmax_t(x_t . q / sqrt(d)); sum_t w_t x_t: (T, n, d) -> (n, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(x, self.query) / math.sqrt(x.shape[-1])
        weights = torch.softmax(scores, dim=0)
        return (weights.unsqueeze(-1) * x).sum(dim=0)


class Router(nn.Module):
    """Laplace gate l_e = -||x - w_e||, noise softplus(x W_noise) + 0.01 in training, softmax over the K largest."""

    def __init__(self, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.experts, self.k = experts, k
        self.pool = TemporalPool(width)
        self.w_gate = nn.Parameter(torch.randn(width, experts) * width**-0.5)
        self.w_noise = nn.Parameter(torch.zeros(width, experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, n, d) -> gates (n, E) with zeros where an expert was not chosen, load (E,)."""
        pooled = self.pool(x)
        clean = -torch.cdist(pooled, self.w_gate.t())
        logits, sigma = clean, None
        if self.training:
            sigma = F.softplus(pooled @ self.w_noise) + 0.01
            logits = clean + torch.randn_like(clean) * sigma
        top, index = logits.topk(min(self.k + 1, self.experts), dim=1)
        kept, chosen = top[:, : self.k], index[:, : self.k]
        weights = torch.exp(kept - torch.logsumexp(kept, dim=1, keepdim=True))
        gates = torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))
        if sigma is not None and self.k < self.experts:
            load = self._expected_load(clean, logits, sigma, top).sum(0)
        else:
            load = (gates > 0).sum(0)
        return gates, load

    def _expected_load(self, clean: Tensor, noisy: Tensor, sigma: Tensor, top: Tensor) -> Tensor:
        """Phi((l - threshold) / sigma), the threshold being the logit that it would have to beat."""
        if_in, if_out = top[:, self.k, None], top[:, self.k - 1, None]
        normal = Normal(clean.new_tensor([0.0]), clean.new_tensor([1.0]))
        inside = normal.cdf((clean - if_in) / sigma)
        outside = normal.cdf((clean - if_out) / sigma)
        return torch.where(noisy > if_in, inside, outside)


def squared_variation(v: Tensor) -> Tensor:
    """CV^2, (E,) -> scalar."""
    v = v.float()
    return v.var() / (v.mean() ** 2 + 1e-10)
