"""Parts that a stage may add to a block beside its pool: more experts, a column of its own, or low-rank experts.

A task at cursor s reads the column of the newest stage <= s, which may read those before it; a column is trained in
its stage and frozen afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.nn.block import Block, Column
from flame_moe.nn.experts import ExpertPool, Joined
from flame_moe.nn.gating import Routing
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.nn.stacked import StackedMatrix
from flame_moe.schema import ModelConfig


class MoreExperts(Column):
    """New experts beside the old ones: a sequence may go to any expert of the stages up to its cursor.

    Args:
        config: of the model.
        experts: how many.
        stage: the stage that adds and trains them.
    """

    def __init__(self, config: ModelConfig, experts: int, stage: int) -> None:
        super().__init__()
        self.pool = ExpertPool(experts, config.width, config.hidden, config.kernel, config.dropout, stage=stage)

    def mix(
        self, block: Block, ready: Mapping[str, Sequences], cursor: int
    ) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        columns = [c for c in block.columns_until(cursor).values() if isinstance(c, MoreExperts)]
        assert block.pool is not None
        routings = block.route(ready, cursor)
        return mixture(ready, routings, Joined([block.pool, *(c.pool for c in columns)]), cursor), routings


class Progressive(Column):
    """A fresh column of experts that looks sideways at what all earlier columns make of the same sequences:

        y = MoE_s(z) + U GELU(V [y_0; ..; y_(s-1)])

    (Rusu et al. 2016, arXiv 1606.04671, for one layer.) An earlier column that never learned to route a modality
    says nothing about it, which is zero.

    Args:
        config: of the model.
        experts: of the column.
        stage: the stage that adds and trains it.
        earlier: how many columns there are before it, the first stage's pool included.
    """

    def __init__(self, config: ModelConfig, experts: int, stage: int, earlier: int) -> None:
        super().__init__()
        self.pool = ExpertPool(experts, config.width, config.hidden, config.kernel, config.dropout, stage=stage)
        self.down = StackedLinear(earlier * config.width, config.width, stage=stage)
        self.up = StackedLinear(config.width, config.width, stage=stage)

    def mix(
        self, block: Block, ready: Mapping[str, Sequences], cursor: int
    ) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        assert block.pool is not None
        said: list[dict[str, Tensor]] = []
        routings: dict[str, Routing] = {}
        for stage, column in [(0, None), *block.columns_until(cursor).items()]:
            known = {name: z for name, z in ready.items() if block.routes(name, stage)}
            routings = block.route(known, stage)
            pool = block.pool if column is None else column.pool
            assert isinstance(pool, ExpertPool)
            mixed = mixture(known, routings, pool, stage) if known else {}
            if isinstance(column, Progressive):
                mixed = {name: y + column._sideways(ready[name], name, said, stage) for name, y in mixed.items()}
            said.append(mixed)
        return said[-1], routings

    def _sideways(self, z: Sequences, name: str, said: Sequence[Mapping[str, Tensor]], stage: int) -> Tensor:
        before = torch.cat([y[name] if name in y else torch.zeros_like(z.x) for y in said], dim=-1)
        return self.up(F.gelu(self.down(before, stage)), stage)


class LowRankExperts(Column):
    """Low-rank experts beside the frozen pool, chosen anew for every step (Yang et al. 2024, arXiv 2402.11260):

        y = MoE_0(z) + sum over the k best i of softmax(z W)_i A_i B_i z

    over the low-rank experts of all stages up to the cursor, scored by the gate W of the cursor's own column.

    Args:
        config: of the model.
        experts: how many.
        rank: of each.
        stage: the stage that adds and trains them.
        earlier: how many low-rank experts there are already.
    """

    def __init__(self, config: ModelConfig, experts: int, rank: int, stage: int, earlier: int) -> None:
        super().__init__()
        self.k = min(config.top_k, experts + earlier)
        self.gate = StackedMatrix(experts + earlier, config.width, stage=stage)
        self.a = StackedMatrix(experts, config.width, rank, stage=stage, bound=0.0)
        self.b = StackedMatrix(experts, rank, config.width, stage=stage)

    def mix(
        self, block: Block, ready: Mapping[str, Sequences], cursor: int
    ) -> tuple[dict[str, Tensor], dict[str, Routing]]:
        assert block.pool is not None
        routings = block.route(ready, cursor)
        mixed = mixture(ready, routings, block.pool, cursor)
        columns = [c for c in block.columns_until(cursor).values() if isinstance(c, LowRankExperts)]
        a = torch.cat([c.a.effective(cursor) for c in columns])
        b = torch.cat([c.b.effective(cursor) for c in columns])
        return {name: y + self._experts(ready[name].x, a, b, cursor) for name, y in mixed.items()}, routings

    def _experts(self, x: Tensor, a: Tensor, b: Tensor, cursor: int) -> Tensor:
        """(n, T, d) -> (n, T, d)."""
        scores = F.linear(x, self.gate.effective(cursor))
        best = scores.topk(self.k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, torch.softmax(best.values, dim=-1))
        low = torch.einsum("ntd,erd->nter", x, b) * weights[..., None]
        return torch.einsum("nter,edr->ntd", low, a)
