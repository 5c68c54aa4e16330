"""What one layer of PASs-MoE remembers of earlier tasks, and the loss that keeps it (arXiv 2601.13020, PASs-RS).

E experts of rank r; a_ek is row k of expert e's A, b_ek column k of its B, h an input, pi_e the weight of expert e.

    I_ek(t)  = E_h [ pi_e(h) (a_ek^T h)^2 ]       importance of a rank in task t
    I(t)     = I(t-1) + I(t)                      accumulated after each task
    w_ek     = I_ek / mean I, capped, zero outside the most important share
    L        = lambda_A sum w_ek ||a_ek - a_ek^ref||^2 + lambda_B sum w_ek ||b_ek - b_ek^ref||^2

and the model divides L by N, the number of ranks of all its layers.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from flame_moe.mllm.adapters.pass_config import PassMoeConfig
from flame_moe.mllm.adapters.scores import entropy


class PathwayMemory(nn.Module):
    """Statistics of one layer, float32 buffers that are saved with the adapter.

    Attributes:
        importance: (E, r) accumulated over the finished tasks.
        anchor_a: (E r, n) where A is held.
        anchor_b: (out, E r) where B is held.
        current: (E, r) of the running task: the mean importance of a rank so far.
        entropy: mean entropy of a token's weights in the running task, in nats.
        tokens: how many tokens of the running task those means are over.
        steps: how many forwards.
        tasks: how many tasks are finished.
    """

    importance: Tensor
    anchor_a: Tensor
    anchor_b: Tensor
    current: Tensor
    entropy: Tensor
    tokens: Tensor
    steps: Tensor
    tasks: Tensor

    def __init__(self, config: PassMoeConfig, r: int, features: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.shape = (config.experts, r)
        width = config.experts * r
        for name, shape in (
            ("importance", self.shape),
            ("current", self.shape),
            ("anchor_a", (width, features)),
            ("anchor_b", (outputs, width)),
            ("entropy", ()),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))
        for name in ("tokens", "steps", "tasks"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def see(self, weights: Tensor, coordinates: Tensor, real: Tensor | None) -> None:
        """Count one forward of the running task.

        Args:
            weights: (..., E) pi.
            coordinates: (..., E, r) a_ek^T h.
            real: (...) which tokens count; None: all.
        """
        pi, z = weights.float(), coordinates.float()
        if real is None:
            pi, z = pi.reshape(-1, pi.shape[-1]), z.reshape(-1, *z.shape[-2:])
        else:
            pi, z = pi[real], z[real]
        count = len(pi)
        if not count:
            return
        share = count / (self.tokens + count).float()
        self.entropy.lerp_(entropy(pi).mean(), share)
        if self.config.importance == "product":
            batch = pi.mean(dim=0)[:, None] * z.square().mean(dim=0)
            first = self.steps == 0
            kept = torch.where(first, torch.zeros_like(share), torch.full_like(share, self.config.importance_decay))
            self.current.copy_(kept * self.current + (1 - kept) * batch)
        else:
            self.current.lerp_((pi[..., None] * z.square()).mean(dim=0), share)
        self.tokens += count
        self.steps += 1

    def start_task(self) -> None:
        """Forget the statistics of a running task; what earlier tasks left stays."""
        for buffer in (self.current, self.entropy, self.tokens, self.steps):
            buffer.zero_()

    @torch.no_grad()
    def finish_task(self, a: Tensor, b: Tensor) -> None:
        """Add the running task to what is remembered, and hold the matrices where they are now.

        Args:
            a: (E r, n) A of all experts.
            b: (out, E r) B of all experts.
        """
        a, b = a.detach().float(), b.detach().float()
        if self.config.anchor == "running":
            old, new = self.importance.flatten(), self.current.flatten()
            share = torch.where(old + new > 0, new / (old + new).clamp_min(1e-30), torch.ones_like(new))
            self.anchor_a.copy_(self.anchor_a + share[:, None] * (a - self.anchor_a))
            self.anchor_b.copy_(self.anchor_b + share[None, :] * (b - self.anchor_b))
        else:
            self.anchor_a.copy_(a)
            self.anchor_b.copy_(b)
        self.importance += self.current
        self.tasks += 1
        self.start_task()

    def weights(self, name: str) -> Tensor:
        """w of every rank, (E, r).

        Args:
            name: of the layer, from which the control "random" draws.
        """
        importance = self.importance
        if self.config.importance == "even":
            importance = torch.ones_like(importance)
        if self.config.importance == "random":
            generator = torch.Generator().manual_seed(self.config.seed + zlib.crc32(name.encode()))
            order = torch.randperm(importance.numel(), generator=generator).to(importance.device)
            importance = importance.flatten()[order].view(self.shape)
        w = importance / importance.mean().clamp_min(1e-30)
        if self.config.weight_cap is not None:
            w = w.clamp_max(self.config.weight_cap)
        kept = max(1, math.ceil(self.config.top_share * w.numel()))
        if kept < w.numel():
            where = w.flatten().topk(kept).indices
            w = torch.zeros_like(w.flatten()).scatter(0, where, w.flatten()[where]).view(self.shape)
        return w

    def loss(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """lambda_A sum w ||a - a_ref||^2 + lambda_B sum w ||b - b_ref||^2 of this layer, not yet over N."""
        w = self.weights(name).flatten()
        of_a = (w * (a.float() - self.anchor_a).square().sum(dim=1)).sum()
        of_b = (w * (b.float() - self.anchor_b).square().sum(dim=0)).sum()
        return self.config.lambda_a * of_a + self.config.lambda_b * of_b
