"""Compressing a stage's updates to low rank.

Every mode keeps a projection of the update, Delta_r = U_r U_r^T Delta, and they differ in the directions U:

    weight      left singular vectors of Delta (paper Eq. 3): least ||Delta - Delta_r||_F
    activation  eigenvectors of G = Delta C Delta^T, C = E[z z^T] of the inputs: least E||(Delta - Delta_r) z||^2
    loss        the same of S^(1/2) Delta, S_i = E[g_i^2] of the loss's gradient g by the outputs: least
                E||S^(1/2) (Delta - Delta_r) z||^2, twice what the loss loses to second order; oblique projection
    none        all of them: the update is kept as it is

With a bias correction, b += (Delta - Delta_r) E[z], what is left is the error on centred inputs, so `activation` then
takes C - E[z] E[z]^T. Inputs that pick rows of a table are one-hot: there the map is Delta^T, and C is diagonal.

How much is kept: a rank, a share of each update's energy, or a budget of numbers for all updates of a stage together.
Factors that would cost at least as much as the dense update, r (out + in) >= out in, are stored dense instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame_moe.continual.moments import Moment
from flame_moe.continual.spectra import (
    Spectrum,
    by_budget,
    by_energy,
    by_inputs,
    by_singular_values,
    energy_of,
    of_rank,
    stack_by_inputs,
)
from flame_moe.nn.slices import LowRank, Slice, pack
from flame_moe.nn.stacked import Factorise

Mode = Literal["weight", "activation", "loss", "none"]
_LEAST = 1e-3
"""What an error in any output of a matrix costs at least, as a share of the mean over its outputs."""


class Plan(NamedTuple):
    """How the updates of a stage are compressed.

    Attributes:
        mode: which directions.
        keep: what decides the ranks.
        rank: for keep = "rank": per matrix; None is dense, 0 keeps nothing.
        energy: for keep = "energy": share of each update's energy; Frobenius for `weight`, else functional.
        budget: for keep = "budget": numbers of the whole stage; below 1 a share of what its dense updates would store.
        centred: a bias, where there is one, takes the mean of what is lost.
    """

    mode: Mode = "weight"
    keep: Literal["rank", "energy", "budget"] = "rank"
    rank: int | None = 16
    energy: float = 0.99
    budget: float = 0.1
    centred: bool = False

    @property
    def keeps_all(self) -> bool:
        """Whether every update stays as it is."""
        return self.mode == "none" or (self.keep == "rank" and self.rank is None)

    @property
    def reads_inputs(self) -> bool:
        """Whether it needs the moments of the inputs."""
        return not self.keeps_all and (self.mode in ("activation", "loss") or self.centred)

    @property
    def reads_gradients(self) -> bool:
        """Whether it needs the squared gradients of the weights."""
        return not self.keeps_all and (self.mode == "loss" or (self.mode == "activation" and self.keep == "budget"))

    def ranks(self, spectra: Sequence[Spectrum]) -> list[int | None]:
        """Rank of each matrix, None for dense."""
        if self.keep == "rank":
            return of_rank(spectra, self.rank)
        if self.keep == "energy":
            return by_energy(spectra, self.energy)
        dense = sum(s.cost(None) for s in spectra)
        return by_budget(spectra, int(self.budget * dense) if self.budget < 1 else int(self.budget))


class Truncated(NamedTuple):
    """What became of the update of one weight.

    Attributes:
        part: what is kept.
        ranks: per matrix of the stack; None for dense, 0 for nothing.
        relative_error: ||Delta - kept||_F / ||Delta||_F.
        functional_error: (E||(Delta - kept) z||^2 / E||Delta z||^2)^(1/2) over the inputs, after the bias has taken the
            mean if it does; None where the inputs are not known.
        shift: (..., out) what the bias takes, (Delta - kept) E[z]; None if it takes nothing.
    """

    part: Slice
    ranks: tuple[int | None, ...]
    relative_error: float
    functional_error: float | None
    shift: Tensor | None


def truncate(
    deltas: Mapping[str, Tensor],
    plan: Plan,
    moments: Mapping[str, Moment] | None = None,
    *,
    squares: Mapping[str, Tensor] | None = None,
    biased: Collection[str] = (),
) -> dict[str, Truncated]:
    """Compress the updates of a stage, all at once because they may share a budget.

    Under `activation` and `loss` they share it by what their errors cost the loss; under `activation` with the mean
    cost over the outputs of a matrix. A matrix that saw no input, or whose outputs do not reach the loss, has nothing
    to lose.

    Args:
        deltas: name -> (..., out, in), not all zero.
        plan: how.
        moments: name -> of its inputs; what the plan `reads_inputs` for.
        squares: name -> of its gradients (`sensitivity.squared_gradients`); what the plan `reads_gradients` for.
        biased: names of the weights whose bias can take a mean.
    """
    deltas = {name: delta.detach() for name, delta in deltas.items()}
    if plan.keeps_all:
        return {name: Truncated(d, (None,) * len(_matrices(d)), 0.0, 0.0, None) for name, d in deltas.items()}
    moments, squares = moments or {}, squares or {}
    spectra = {
        name: _spectra(delta, plan, moments.get(name), squares.get(name), centred=plan.centred and name in biased)
        for name, delta in deltas.items()
    }
    chosen = plan.ranks([s for many in spectra.values() for s in many])
    found, start = {}, 0
    for name, many in spectra.items():
        ranks = tuple(chosen[start : start + len(many)])
        start += len(many)
        found[name] = _kept(deltas[name], many, ranks, moments.get(name), centred=plan.centred and name in biased)
    return found


def _matrices(stack: Tensor) -> Tensor:
    return stack.reshape(-1, *stack.shape[-2:])


def _spectra(
    delta: Tensor, plan: Plan, moment: Moment | None, squares: Tensor | None, *, centred: bool
) -> list[Spectrum]:
    if plan.mode not in ("activation", "loss"):
        return [by_singular_values(d) for d in _matrices(delta)]
    stack, seen = _matrices(delta), [] if moment is None else moment.seen.bool().tolist()
    felt = None
    if moment is not None and squares is not None:
        # E||dL/dW_i||^2 = E[g_i^2] E||z||^2, with how often the matrix is reached in both.
        length = moment.second.sum(1) if moment.one_hot else moment.second.diagonal(dim1=1, dim2=2).sum(1)
        felt = squares / length[:, None].clamp(min=1e-30)
        seen = [there and reaches for there, reaches in zip(seen, felt.bool().any(1).tolist(), strict=True)]
    known = [e for e, there in enumerate(seen) if there]
    many = [None if e in known else _blind(d) for e, d in enumerate(stack)]
    if moment is None or not known:
        return [s for s in many if s is not None]
    some = slice(None) if len(known) == len(stack) else known
    cost = None
    if plan.mode == "loss" and felt is not None:
        cost = felt[some] + _LEAST * felt[some].mean(1, keepdim=True)
    if moment.one_hot:
        found = [by_inputs(stack[0], moment.mean[0], moment.second[0], felt=None if cost is None else cost[0])]
    else:
        found = stack_by_inputs(stack[some], moment.mean[some], moment.second[some], centred=centred, felt=cost)
    for e, spectrum in zip(known, found, strict=True):
        worth = float(felt[e].mean()) if felt is not None and cost is None else 1.0
        many[e] = spectrum._replace(worth=worth)
    return [s for s in many if s is not None]


def _blind(delta: Tensor) -> Spectrum:
    """Of a matrix that saw no input, or whose outputs do not reach the loss: it has nothing to lose."""
    found = by_singular_values(delta)
    return found._replace(error=np.zeros_like(found.error), energy=0.0)


def _kept(
    delta: Tensor, spectra: Sequence[Spectrum], ranks: tuple[int | None, ...], moment: Moment | None, *, centred: bool
) -> Truncated:
    parts = [s.part(r, d) for s, r, d in zip(spectra, ranks, _matrices(delta), strict=True)]
    part = pack(parts, delta.shape)
    kept = torch.zeros_like(delta) if part is None else part if isinstance(part, Tensor) else part.dense()
    lost = delta - kept.view(delta.shape)
    relative = float(lost.norm() / delta.norm())
    if moment is None:
        return Truncated(part, ranks, relative, None, None)
    shift = None
    rest, whole = 0.0, 0.0
    for e, (s, r, d, gone) in enumerate(zip(spectra, ranks, _matrices(delta), _matrices(lost), strict=True)):
        n, second = float(moment.seen[e]), moment.second[e]
        if s.functional:
            whole, rest = whole + n * s.energy, rest + n * (0.0 if r is None else float(s.error[r]))
        elif n:
            centre = second - torch.outer(moment.mean[e], moment.mean[e]) if centred else second
            whole, rest = whole + n * energy_of(d.double(), second), rest + n * energy_of(gone.double(), centre)
    if centred:
        shift = torch.einsum("eoi,ei->eo", _matrices(lost).double(), moment.mean).to(delta.dtype)
        shift = shift.view(delta.shape[:-1])
    functional = math.sqrt(max(rest, 0.0) / whole) if whole else 0.0
    return Truncated(part, ranks, relative, functional, shift)


def by_weight(rank: int | None) -> Factorise:
    """Truncated singular value decomposition to `rank` per matrix (Eq. 3), as `StackedMatrix.commit` takes it."""
    plan = Plan(rank=rank)

    def factorise(delta: Tensor) -> Slice:
        return truncate({"": delta}, plan)[""].part

    return factorise


def fresh(shape: torch.Size, rank: int) -> LowRank | Tensor:
    """A zero update of this rank that can train: A = 0, B uniform in +-1 / sqrt(in), as LoRA starts (Hu et al. 2022).

    Dense zeros where factors would cost as much. Draws from the global generator.
    """
    *lead, out, width = shape
    if rank >= min(out, width) or rank * (out + width) >= out * width:
        return torch.zeros(shape)
    limit = 1.0 / math.sqrt(width)
    return LowRank(torch.zeros(*lead, out, rank), torch.empty(*lead, rank, width).uniform_(-limit, limit))
