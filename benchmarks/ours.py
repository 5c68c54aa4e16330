"""Our side of the comparisons: the package's own parts with the weights of the published ones put into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.published import attention
from benchmarks.published.moe import Expert, SeqMoE
from flame_moe.nn.block import Block
from flame_moe.nn.encoders.time_attention import TimeAttention
from flame_moe.nn.experts import ExpertPool
from flame_moe.nn.gating import Routing
from flame_moe.nn.losses import balance_loss, interaction_loss
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.schema import ModelConfig


def flat_kernel(conv: Tensor) -> Tensor:
    """A kernel (d, d, k) as the pool keeps it: (d, k d), tap after tap."""
    return conv.permute(0, 2, 1).flatten(1)


@torch.no_grad()
def fill(pool: ExpertPool, experts: list[Expert]) -> ExpertPool:
    """Put the weights of published experts into a pool."""
    pool.conv.base.copy_(torch.stack([flat_kernel(e.conv.weight) for e in experts]))
    pool.fc1.base.copy_(torch.stack([e.fc1.weight for e in experts]))
    pool.fc2.base.copy_(torch.stack([e.fc2.weight for e in experts]))
    for ours, theirs in (
        (pool.conv_bias, [e.conv.bias for e in experts]),
        (pool.norm_weight, [e.norm.weight for e in experts]),
        (pool.norm_bias, [e.norm.bias for e in experts]),
        (pool.fc1_bias, [e.fc1.bias for e in experts]),
        (pool.fc2_bias, [e.fc2.bias for e in experts]),
    ):
        ours.at(0).copy_(torch.stack([t.detach() for t in theirs]))
    return pool


class Mixture(nn.Module):
    """What a block does between its norms: routers, experts, auxiliary losses; the counterpart of `SeqMoE`."""

    def __init__(self, published: SeqMoE, *, width: int = 128, hidden: int = 256, kernel: int = 3) -> None:
        super().__init__()
        first = next(iter(published.routers.values()))
        config = ModelConfig(
            preset="reference",
            width=width,
            heads=4,
            experts=len(published.experts),
            top_k=first.k,
            hidden=hidden,
            kernel=kernel,
            dropout=published.experts[0].dropout,
        )
        self.block = Block(config)
        assert self.block.pool is not None
        fill(self.block.pool, list(published.experts))
        for name, router in published.routers.items():
            self.block.add_modality(name, 0)
            self.block.add_router_head(name, 0)
            own = self.block.router(name)
            assert own is not None
            head = own.head(0)
            with torch.no_grad():
                head.query.copy_(router.pool.query)
                head.gate.copy_(router.w_gate.T)
                head.noise.copy_(router.w_noise.T)

    def route(self, inputs: Mapping[str, Sequences]) -> dict[str, Routing]:
        return self.block.route(inputs, 0)

    def mix(self, inputs: Mapping[str, Sequences], routings: Mapping[str, Routing]) -> tuple[dict[str, Tensor], Tensor]:
        """What the experts say, and the auxiliary loss, of sequences whose way is known."""
        assert self.block.pool is not None
        out = mixture(inputs, routings, self.block.pool, 0)
        parts = list(routings.values())
        return out, 0.01 * balance_loss(parts) + 0.1 * interaction_loss(parts, "spread", clean=False)

    def forward(self, inputs: Mapping[str, Sequences]) -> tuple[dict[str, Tensor], Tensor]:
        return self.mix(inputs, self.route(inputs))


def time_attention(published: attention.TimeAttention, channels: int, width: int, time_width: int) -> TimeAttention:
    """Ours with the published weights; the columns that read whether a channel was ever observed are zero."""
    heads, steps = published.heads, len(published.grid)
    ours = TimeAttention(channels, width, steps, heads, time_width, published.dropout, stage=0)
    embed = published.embed
    with torch.no_grad():
        ours.embed.weight.base.copy_(torch.cat([embed.linear.weight, embed.periodic.weight]))
        ours.embed.bias.at(0).copy_(torch.cat([embed.linear.bias, embed.periodic.bias]))
        for layer, linear in ((ours.query, published.query), (ours.key, published.key)):
            layer.weight.base.copy_(linear.weight)
            assert layer.bias is not None
            layer.bias.at(0).copy_(linear.bias)
        ours.out.weight.base.zero_()
        ours.out.weight.base[:, : heads * channels].copy_(published.out.weight)
        assert ours.out.bias is not None
        ours.out.bias.at(0).copy_(published.out.bias)
    return ours
