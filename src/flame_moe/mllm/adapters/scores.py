"""How a token chooses among experts: scores, top-k weights, agreement over a sequence. Pure functions.

Shapes: B samples, T tokens, n input features of the layer, E experts, k chosen ones; `...` is any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

DISCRIMINANT = "discriminant"
SCORES = ("standardized", "cosine", "raw", "arrow", DISCRIMINANT)
EPS = 1e-5
"""Of the standardisation, as in LayerNorm: a routing vector whose variance is below about 1e-3 feels it."""


def scores(x: Tensor, vectors: Tensor, kind: str) -> Tensor:
    """Score of every expert for every token, in float32.

        standardized   LN(u)^T LN(v) / sqrt(n), LN without affine, eps 1e-5   (PHATGOOSE, arXiv 2402.05859)
        cosine         u^T v / (|u| |v|)
        raw            u^T v
        arrow          |u^T v|                                                (Arrow, arXiv 2405.11157)
        discriminant   u^T v, to which the offset of the expert is to be added (`discriminant`)

    Args:
        x: (..., n) inputs of the layer.
        vectors: (E, n) one routing vector per expert.
        kind: one of `SCORES`.

    Returns:
        (..., E)

    Example:
        >>> scores(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0], [0.0, -1.0]]), "cosine").tolist()
        [[1.0, -0.800000011920929]]
    """
    with torch.autocast(x.device.type, enabled=False):
        return _scores(x.float(), vectors.float(), kind)


def _scores(x: Tensor, vectors: Tensor, kind: str) -> Tensor:
    if kind == "standardized":
        n = x.shape[-1]
        x = functional.layer_norm(x, (n,), eps=EPS)
        vectors = functional.layer_norm(vectors, (n,), eps=EPS)
        return x @ vectors.T / n**0.5
    if kind == "cosine":
        return functional.normalize(x, dim=-1) @ functional.normalize(vectors, dim=-1).T
    raw = x @ vectors.T
    return raw.abs() if kind == "arrow" else raw


def discriminant(own: Tensor, background: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Routing vector v and offset b: u^T v + b says how much likelier u is among a task's prompts than elsewhere.

    The logarithm of the ratio of two normal densities with the means of both samples and the covariance C of the
    background (Fisher's linear discriminant; for prototypes of continual learning see RanPAC, arXiv 2307.02251):

        v = C^-1 (m - m_0),   b = -v^T (m + m_0) / 2,   C = cov(background) + ridge * (mean variance) * 1

    Args:
        own: (samples, n) of the task.
        background: (samples, n), at least 2; with fewer than n a system of that size is solved instead.
        ridge: above 0.

    Returns:
        (n,) and (), in float64.

    Example:
        >>> v, b = discriminant(torch.tensor([[3.0], [5.0]]), torch.tensor([[-1.0], [1.0]]), ridge=1e-9)
        >>> round(float(4 * v + b), 3)  # at the mean of the task: half of (4 / 1)^2
        8.0
    """
    own, background = own.double(), background.double()
    apart = own.mean(dim=0) - background.mean(dim=0)
    rows = background - background.mean(dim=0)
    count, n = rows.shape
    spread = (ridge * rows.square().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    if count < n:
        inner = rows @ rows.T + count * spread * torch.eye(count, dtype=rows.dtype, device=rows.device)
        vector = (apart - rows.T @ torch.linalg.solve(inner, rows @ apart)) / spread
    else:
        covariance = rows.T @ rows / count + spread * torch.eye(n, dtype=rows.dtype, device=rows.device)
        vector = torch.linalg.solve(covariance, apart)
    return vector, -vector @ (own.mean(dim=0) + background.mean(dim=0)) / 2


def gate(x: Tensor, vector: Tensor) -> Tensor:
    """sigmoid(v^T u), in float32: (..., n) and (n,) -> (..., 1)."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(x.float() @ vector.float()).unsqueeze(-1)


def top_k_weights(score: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Softmax over the k best scores of each token, exactly zero elsewhere.

    Equal to the softmax over all experts, cut to the best k and divided by their sum; k is at most E.

    Args:
        score: (..., E)
        k: how many experts a token uses.
        temperature: by which scores are divided before.

    Returns:
        (..., E), each row sums to 1 and has k entries above zero.

    Example:
        >>> top_k_weights(torch.tensor([1.0, 3.0, 3.0]), 2).tolist()
        [0.0, 0.5, 0.5]
    """
    best, where = (score / temperature).topk(min(k, score.shape[-1]), dim=-1)
    return torch.zeros_like(score).scatter(-1, where, best.softmax(dim=-1))


def pooled(score: Tensor, counted: Tensor | None) -> Tensor:
    """Mean score of a sequence over the tokens that count, the agreement by which a whole sample is routed.

    Args:
        score: (B, T, E)
        counted: (B, T) which tokens count, or None for all; a sample without any is averaged over all.

    Returns:
        (B, 1, E)
    """
    if counted is None:
        return score.mean(dim=1, keepdim=True)
    counted = torch.where(counted.any(dim=1, keepdim=True), counted, torch.ones_like(counted))
    share = counted.to(score.dtype).unsqueeze(-1)
    return (score * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True)


def entropy(weights: Tensor) -> Tensor:
    """Entropy of each row in nats: (..., E) -> (...)."""
    return torch.special.entr(weights).sum(dim=-1)
