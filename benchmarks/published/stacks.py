"""One expert after several stages as published: outputs of whole components are summed, weights rebuilt in every call.

And the low-rank baseline that sums weights instead, W0 + sum_j A_j B_j, also rebuilt in every call: the function of
`flame_moe.nn.stacked` (paper Eq. 4), computed the slow way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published.moe import Expert


class Factored(nn.Module):
    """A weight (out, in) as U, S, Vh of rank r, frozen; a kernel (out, in, k) is flattened first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.shape = weight.shape
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.register_buffer("u", u[:, :rank].contiguous())
        self.register_buffer("s", s[:rank].contiguous())
        self.register_buffer("vh", vh[:rank].contiguous())

    def forward(self) -> Tensor:
        return ((self.u * self.s) @ self.vh).view(self.shape)


class TruncatedExpert(nn.Module):
    """A component that was cut to rank r and frozen; biases and norm are kept whole."""

    def __init__(self, expert: Expert, rank: int) -> None:
        super().__init__()
        self.whole = expert.requires_grad_(False)
        self.conv, self.fc1, self.fc2 = (Factored(m.weight, rank) for m in (expert.conv, expert.fc1, expert.fc2))

    def forward(self, x: Tensor) -> Tensor:
        w = self.whole
        c = F.conv1d(x.transpose(1, 2), self.conv(), w.conv.bias, padding=w.conv.padding[0]).transpose(1, 2)
        h = w.norm(x + F.gelu(c))
        q = F.dropout(F.gelu(F.linear(h, self.fc1(), w.fc1.bias)), w.dropout, self.training)
        return F.linear(q, self.fc2(), w.fc2.bias)


class StackedExpertMLP(nn.Module):
    """out(x) = sum of the outputs of components 0..cursor, each a whole expert of its own."""

    def __init__(self, components: list[nn.Module]) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)

    def forward(self, x: Tensor, cursor: int) -> Tensor:
        out = self.components[0](x)
        for component in self.components[1 : cursor + 1]:
            out = out + component(x)
        return out


class LowRankExpert(nn.Module):
    """A frozen expert with a pair of factors per later stage and matrix; norm and biases are those of the base.

    Args:
        expert: the base.
        factors: matrix ("conv", "fc1", "fc2") -> per later stage (A (out, r), B (r, in)), kernels flattened.
    """

    def __init__(self, expert: Expert, factors: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        super().__init__()
        self.base = expert.requires_grad_(False)
        self.factors = nn.ModuleDict(
            {
                name: nn.ParameterList(nn.Parameter(f, requires_grad=False) for pair in pairs for f in pair)
                for name, pairs in factors.items()
            }
        )

    def weight(self, name: str, cursor: int) -> Tensor:
        base, pairs = getattr(self.base, name).weight, list(self.factors[name])
        total = base.flatten(1)
        for stage in range(min(cursor, len(pairs) // 2)):
            total = total + pairs[2 * stage] @ pairs[2 * stage + 1]
        return total.view(base.shape)

    def forward(self, x: Tensor, cursor: int) -> Tensor:
        b = self.base
        conv, fc1, fc2 = (self.weight(name, cursor) for name in ("conv", "fc1", "fc2"))
        c = F.conv1d(x.transpose(1, 2), conv, b.conv.bias, padding=b.conv.padding[0]).transpose(1, 2)
        h = b.norm(x + F.gelu(c))
        q = F.dropout(F.gelu(F.linear(h, fc1, b.fc1.bias)), b.dropout, self.training)
        return F.linear(q, fc2, b.fc2.bias)
