"""Routing whole sequences to experts: gates, noisy top-k and the differentiable load estimate.

Each modality scores its sequences with its own router; the choice after that is made for all modalities at once:
at small batches it is the number of operations that costs.

Shape suffixes: n sequences, M modalities, N sequences of all of them, E experts, K selected, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.pooling import temporal_attention_pool

_NOISE_FLOOR = 0.01


class Routing(NamedTuple):
    """Where n sequences go.

    Attributes:
        chosen: (n, K) int64 experts, best first, ties to the lower index.
        gates: (n, K) float32, positive, rows sum to 1.
        clean: (n, E) softmax of the noise-free logits.
        load: (E,) estimated number of sequences per expert; sums to about n K.
    """

    chosen: Tensor
    gates: Tensor
    clean: Tensor
    load: Tensor

    def sparse(self) -> Tensor:
        """(n, E) gates with exact zeros for experts that were not chosen."""
        return sparse([self])


def sparse(routings: Sequence[Routing]) -> Tensor:
    """(N, E) gates with exact zeros for experts that were not chosen, one modality after the other."""
    chosen, gates = _joined([r.chosen for r in routings]), _joined([r.gates for r in routings])
    return gates.new_zeros(len(gates), routings[0].clean.shape[1]).scatter(1, chosen, gates)


def softmax_logits(x: Tensor, w: Tensor) -> Tensor:
    """l_e = x . w_e; (n, d), (E, d) -> (n, E)."""
    return x @ w.T


def gaussian_logits(x: Tensor, w: Tensor) -> Tensor:
    """l_e = -||x - w_e||^2; (n, d), (E, d) -> (n, E)."""
    return -(x[:, None, :] - w[None, :, :]).square().sum(-1)


def laplace_logits(x: Tensor, w: Tensor) -> Tensor:
    """l_e = -||x - w_e||, with gradient 0 at zero distance; (n, d), (E, d) -> (n, E)."""
    # Not by a product of x and w, which would cancel where they are close.
    return -torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist")


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": softmax_logits,
    "laplace": laplace_logits,
    "gaussian": gaussian_logits,
}


COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda clean: clean.mean(0),
    "sum": lambda clean: clean.sum(0),
    "max": lambda clean: clean.amax(0),
}
"""How the noise-free logits (heads, n, E) of several heads become (n, E); "own" takes the newest head's alone."""


def noisy_top_k(clean: Tensor, sigma: Tensor | None, k: int, *, count: bool = False) -> Routing:
    """Choose the k largest logits, after adding sigma * N(0, 1) when sigma is given (Shazeer et al. 2017).

    Ties go to the lower expert index. The load estimate is sum_n P(expert e would be chosen under fresh noise),
    differentiable in logits and sigma; without noise, with k = E, or with `count`, it is the plain count.

    Args:
        clean: (n, E) logits.
        sigma: (n, E) positive noise scales (training), or None (evaluation).
        k: experts per sequence, 1 <= k <= E.
        count: take hard counts for the load, which have no gradient.
    """
    return _choose(clean, sigma, k, count, (len(clean),))[0]


def _choose(clean: Tensor, sigma: Tensor | None, k: int, count: bool, sizes: tuple[int, ...]) -> list[Routing]:
    """`noisy_top_k` for the sequences of several modalities, `sizes` of each, (N, E); a Routing for each."""
    experts = clean.shape[1]
    logits = clean if sigma is None else clean + sigma * torch.randn_like(clean)
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    index = order[:, :k]
    gates = torch.softmax(ordered[:, :k], dim=1)
    if sigma is None or k == experts or count:
        load = torch.zeros_like(clean).scatter(1, index, 1.0)
    else:
        load = _expected_load(clean, logits, sigma, ordered[:, k - 1], ordered[:, k])
    each = zip(*(t.split(sizes) for t in (index, gates, torch.softmax(clean, dim=1))), sums(load, sizes), strict=True)
    return [Routing(*one) for one in each]


def sums(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(N, E) -> (M, E): the sum over the rows of each modality, always in the same order."""
    return rows.sum(0, keepdim=True) if len(sizes) == 1 else _members(sizes, rows.device, rows.dtype) @ rows


@lru_cache(maxsize=64)
def _members(sizes: tuple[int, ...], device: torch.device, kind: torch.dtype) -> Tensor:
    """(M, N) with ones where a row belongs to a modality."""
    with torch.inference_mode(False):  # what is made while predicting must serve training as well
        of_row = torch.cat([torch.full((n,), m, device=device) for m, n in enumerate(sizes)])
        return (torch.arange(len(sizes), device=device)[:, None] == of_row).to(kind)


def _expected_load(clean: Tensor, noisy: Tensor, sigma: Tensor, kth: Tensor, next_: Tensor) -> Tensor:
    """(N, E) P(e) = Phi((l_e - threshold) / sigma_e); threshold: v_(K+1) if e was chosen, else v_(K)."""
    chosen = noisy >= kth[:, None]
    threshold = torch.where(chosen, next_[:, None], kth[:, None])
    return torch.special.ndtr((clean - threshold) / sigma)


class Scores(NamedTuple):
    """What a router thinks of n sequences.

    Attributes:
        clean: (n, E) logits without noise.
        noise: (n, E) logits of the noise scales in training, else None.
        k: how many experts a sequence gets.
        counted: whether the load is counted instead of estimated.
    """

    clean: Tensor
    noise: Tensor | None
    k: int
    counted: bool


def choose(scores: Sequence[Scores]) -> list[Routing]:
    """Where the sequences of several modalities go; those that choose in the same way do it together."""
    alike: dict[tuple[int, int, bool, bool], list[int]] = {}
    for i, s in enumerate(scores):
        alike.setdefault((s.clean.shape[1], s.k, s.counted, s.noise is None), []).append(i)
    found: dict[int, Routing] = {}
    for (_, k, count, silent), places in alike.items():
        parts = [scores[i] for i in places]
        sizes = tuple(len(s.clean) for s in parts)
        clean = _joined([s.clean for s in parts])
        with torch.autocast(clean.device.type, enabled=False):
            sigma = None
            if not silent:
                sigma = F.softplus(_joined([s.noise for s in parts if s.noise is not None])) + _NOISE_FLOOR
            found.update(zip(places, _choose(clean, sigma, k, count, sizes), strict=True))
    return [found[i] for i in range(len(scores))]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class RouterHead(nn.Module):
    """Pooling query, gate and noise weights of one router at one stage.

    Args:
        width: d.
        experts: E.
        zero: start with all experts tied, as the published code does; default small random weights.
        combine: "own": its tasks read this head alone; "append": this head scores the experts that come after those of
            the heads before it, and its tasks read all of them side by side; or how its tasks mix its logits with those
            of the heads before it (`COMBINE`).
        load: "expected" (see `noisy_top_k`) or "count".
    """

    def __init__(
        self, width: int, experts: int, *, zero: bool = False, combine: str = "own", load: str = "expected"
    ) -> None:
        super().__init__()
        self.combine, self.load = combine, load
        self.query = nn.Parameter(torch.randn(width))
        start = torch.zeros(experts, width) if zero else torch.randn(experts, width) * width**-0.5
        self.gate = nn.Parameter(start)
        self.noise = nn.Parameter(torch.zeros(experts, width))


class Router(nn.Module):
    """One router: a head per stage that trained one, addressed by the task's cursor.

    Routing is in float32 whatever the autocast; noise only in training mode.
    """

    def __init__(self, width: int, experts: int, k: int, gate: str, *, zero: bool = False) -> None:
        super().__init__()
        self.width, self.experts, self.k, self.gate, self.zero = width, experts, k, gate, zero
        self.heads = nn.ModuleDict()

    def add_head(self, stage: int, *, experts: int | None = None, combine: str = "own", load: str = "expected") -> None:
        """A fresh head for the tasks of `stage` (see `RouterHead`); heads of earlier stages are not touched.

        Args:
            stage: whose tasks read it.
            experts: how many there are to choose from; default those of the pool. With "append" the heads so far have
                scored the first of them, and the new head scores the rest.
            combine: see `RouterHead`.
            load: see `RouterHead`.
        """
        scored = sum(len(head.gate) for head in self.read(stage)) if combine == "append" and self.heads else 0
        rows = (self.experts if experts is None else experts) - scored
        self.heads[str(stage)] = RouterHead(self.width, rows, zero=self.zero, combine=combine, load=load)

    def head(self, cursor: int) -> RouterHead:
        """The head of the greatest stage <= cursor."""
        head = self.heads[str(max(int(s) for s in self.heads if int(s) <= cursor))]
        assert isinstance(head, RouterHead)
        return head

    def read(self, cursor: int) -> list[RouterHead]:
        """The heads that a task with this cursor reads, in order: its own, or all up to it where they are combined."""
        own = self.head(cursor)
        if own.combine == "own":
            return [own]
        return [self.head(stage) for stage in sorted(int(s) for s in self.heads) if stage <= cursor]

    def forward(self, x: Tensor, mask: Tensor, cursor: int) -> Routing:
        """(n, T, d), (n, T) -> Routing of n sequences."""
        return choose([self.scores(x, mask, cursor)])[0]

    def scores(self, x: Tensor, mask: Tensor, cursor: int) -> Scores:
        """(n, T, d), (n, T) -> Scores of n sequences; noise is the newest head's, or of appended heads their own."""
        heads = self.read(cursor)
        own = heads[-1]
        with torch.autocast(x.device.type, enabled=False):
            pooled = [temporal_attention_pool(x.float(), mask, head.query) for head in heads]
            clean = _together([GATES[self.gate](p, head.gate) for p, head in zip(pooled, heads, strict=True)], own)
            mixed = None
            if self.training:
                noise = [F.linear(p, head.noise) for p, head in zip(pooled, heads, strict=True)]
                mixed = torch.cat(noise, dim=1) if own.combine == "append" else noise[-1]
        return Scores(clean, mixed, min(self.k, clean.shape[1]), own.load == "count")


def _together(logits: list[Tensor], own: RouterHead) -> Tensor:
    """Noise-free logits of the heads that a task reads, as its own head says."""
    if len(logits) == 1:
        return logits[0]
    return torch.cat(logits, dim=1) if own.combine == "append" else COMBINE[own.combine](torch.stack(logits))
