"""The published mixture: for every modality a router, a dispatcher on non-zero gates, and a loop over all experts.

Shape suffixes: T steps, n sequences, d width, H hidden, E experts, P = n K pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published.router import Router, squared_variation


class Expert(nn.Module):
    """c = GELU(conv(x)); h = LN(x + c); W2 Dropout(GELU(W1 h + b1)) + b2, on (n, T, d)."""

    def __init__(self, width: int, hidden: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        c = F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))
        h = self.norm(x + c)
        return self.fc2(F.dropout(F.gelu(self.fc1(h)), self.dropout, self.training))


class Dispatcher:
    """Which sequences go to which expert, read off the non-zero entries of gates (n, E)."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates
        pairs, order = torch.nonzero(gates).sort(0)
        self.expert = pairs[:, 1:]
        self.sequence = torch.nonzero(gates)[order[:, 1], 0]
        self.sizes = (gates > 0).sum(0).tolist()
        self.weights = torch.gather(gates[self.sequence], 1, self.expert)

    def dispatch(self, x: Tensor) -> tuple[Tensor, ...]:
        """(n, T, d) -> per expert the sequences that are its own."""
        return torch.split(x[self.sequence], self.sizes, dim=0)

    def combine(self, parts: list[Tensor]) -> Tensor:
        """What the experts say, weighted and summed per sequence, in float32."""
        stitched = torch.cat(parts, 0).float() * self.weights[:, :, None]
        zeros = stitched.new_zeros(len(self.gates), *stitched.shape[1:], requires_grad=True)
        return zeros.index_add(0, self.sequence, stitched)


class SeqMoE(nn.Module):
    """One shared pool, one router per modality, modality after modality.

    Args:
        modalities: their names.
        width, hidden, kernel, dropout: of the experts.
        experts: E.
        k: experts per sequence.
    """

    def __init__(
        self,
        modalities: list[str],
        *,
        width: int = 128,
        hidden: int = 256,
        kernel: int = 3,
        experts: int = 5,
        k: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, hidden, kernel, dropout) for _ in range(experts))
        self.routers = nn.ModuleDict({name: Router(width, experts, k) for name in modalities})

    def forward(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Modality -> (T, n, d), and the auxiliary loss: 0.01 sum of CV^2, 0.1 mean cosine over pairs of modalities."""
        out, shares = {}, []
        balance = next(iter(inputs.values())).new_zeros(())
        for name, x in inputs.items():
            if torch.isnan(x).any():
                raise ValueError(f"NaN in modality '{name}'")
            gates, load = self.routers[name](x)
            balance = balance + squared_variation(gates.sum(0)) + squared_variation(load)
            shares.append(F.normalize(gates.mean(0), dim=0))
            way = Dispatcher(gates)
            parts = way.dispatch(x.transpose(0, 1))
            out[name] = way.combine([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
            out[name] = out[name].transpose(0, 1)
        return out, 0.01 * balance + 0.1 * _alike(shares)


def _alike(shares: list[Tensor]) -> Tensor:
    """Mean cosine over unordered pairs."""
    pairs = [torch.dot(shares[i], shares[j]) for i in range(len(shares)) for j in range(i)]
    return torch.stack(pairs).mean() if pairs else torch.zeros(())
