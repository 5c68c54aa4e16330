"""What a matrix's update loses at each rank, and how ranks are chosen."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_moe.nn.slices import LowRank


class Spectrum(NamedTuple):
    """What one matrix's update loses when only its best r directions are kept.

    Attributes:
        shape: (out, in).
        at: rank r <= k -> Delta_r as factors (out, r) and (r, in), made when they are asked for.
        error: (k + 1,) error of r = 0..k: squared Frobenius norm, or E||.||^2 of what is lost over the inputs.
        energy: of the whole update, in the same measure; error[0] is less where the bias takes the mean.
        worth: factor of the error where several matrices share a budget.
        functional: whether error and energy are E||.||^2 over the inputs, every output counting alike.
    """

    shape: tuple[int, int]
    at: Callable[[int], LowRank]
    error: NDArray[np.float64]
    energy: float
    worth: float = 1.0
    functional: bool = False

    def cost(self, rank: int | None) -> int:
        """Numbers that a rank stores; None is the dense update."""
        out, width = self.shape
        return out * width if rank is None else rank * (out + width)

    def sensible(self, rank: int) -> int | None:
        """The rank, or None where the dense update costs no more."""
        return rank if self.cost(rank) < self.cost(None) and rank < len(self.error) - 1 else None

    def part(self, rank: int | None, delta: Tensor) -> LowRank | Tensor | None:
        """The update at this rank, in the type of `delta`."""
        if rank is None:
            return delta
        if not rank:
            return None
        a, b = self.at(rank)
        return LowRank(a.to(delta.dtype), b.to(delta.dtype))


def by_singular_values(delta: Tensor) -> Spectrum:
    """Singular value decomposition, values folded into the left factor (paper Eq. 3).

    Args:
        delta: (out, in).
    """
    out, width = delta.shape
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    lost = _tails(s.square())
    return Spectrum((out, width), lambda r: LowRank(u[:, :r] * s[:r], vh[:r]), lost, float(lost[0]))


def by_inputs(
    delta: Tensor, mean: Tensor, second: Tensor, *, centred: bool = False, felt: Tensor | None = None
) -> Spectrum:
    """Directions of the output in which the update does most, given its inputs.

    The eigenvalues of Delta C Delta^T are what each direction adds to E||Delta z||^2. Where there are more outputs
    than inputs, Delta = Q R and the eigenvectors are Q times those of R C R^T: no root, no inverse, any C.

    Args:
        delta: (out, in).
        mean: (in,) E[z].
        second: (in, in) E[z z^T]; or (out,), its diagonal for one-hot inputs that pick rows of a table.
        centred: the bias will take (Delta - Delta_r) E[z]. Not for tables.
        felt: (out,), of a table (in,): what an error in each output costs, positive; default 1 each. With S its
            diagonal, directions are those of S^(1/2) Delta, and Delta_r = S^(-1/2) U_r U_r^T S^(1/2) Delta.
    """
    if second.dim() == 1:
        return _of_table(delta, second, felt)
    cost = None if felt is None else felt[None]
    return stack_by_inputs(delta[None], mean[None], second[None], centred=centred, felt=cost)[0]


def stack_by_inputs(
    deltas: Tensor, mean: Tensor, second: Tensor, *, centred: bool = False, felt: Tensor | None = None
) -> list[Spectrum]:
    """`by_inputs` for each of E matrices of one shape.

    Args:
        deltas: (E, out, in).
        mean: (E, in).
        second: (E, in, in).
        centred: see `by_inputs`.
        felt: (E, out) or None.
    """
    roots = [None] * len(deltas) if felt is None else felt.double().sqrt()[:, :, None]
    each = zip(deltas, mean, second, roots, strict=True)
    return [_of_map(delta, middle, moment, root, centred=centred) for delta, middle, moment, root in each]


def _of_map(delta: Tensor, mean: Tensor, second: Tensor, root: Tensor | None, *, centred: bool) -> Spectrum:
    """`by_inputs` of a linear map (out, in); `root` (out, 1) is S^(1/2)."""

    def scaled() -> Tensor:
        return delta.double() if root is None else root * delta

    out, width = delta.shape
    q, core = (None, scaled()) if out <= width else torch.linalg.qr(scaled())
    gram = _lower(core @ second, core)
    energy = max(float(gram.diagonal().sum()), 0.0)
    if centred:
        shift = core @ mean
        gram -= torch.outer(shift, shift)
    values, vectors = torch.linalg.eigh(gram)

    def at(r: int) -> LowRank:
        u = vectors[:, len(values) - r :].flip(1)
        u = u if q is None else q @ u
        return LowRank(u if root is None else u / root, u.T @ scaled())

    lost = _tails(values.flip(0).clamp(min=0.0))
    return Spectrum((out, width), at, lost, energy, functional=root is None)


def _lower(left: Tensor, right: Tensor, block: int = 128) -> Tensor:
    """left @ right.T where that is symmetric: its lower triangle, which is all that `torch.linalg.eigh` reads."""
    n = len(left)
    product = left.new_zeros(n, n)
    for start in range(0, n, block):
        end = min(n, start + block)
        torch.mm(left[start:end], right[:end].T, out=product[start:end, :end])
    return product


def _of_table(delta: Tensor, shares: Tensor, felt: Tensor | None) -> Spectrum:
    """`by_inputs` of a table (rows, width) whose rows are picked with these shares: the map is its transpose."""
    root = torch.ones(delta.shape[1], dtype=torch.float64) if felt is None else felt.double().sqrt()
    scaled = delta.double() * root
    q, core = (None, scaled.T) if delta.shape[1] <= delta.shape[0] else torch.linalg.qr(scaled.T)
    values, vectors = torch.linalg.eigh(core * shares @ core.T)
    u, saved = (vectors if q is None else q @ vectors).flip(1), values.flip(0).clamp(min=0.0)
    shape = (delta.shape[0], delta.shape[1])

    def at(r: int) -> LowRank:
        return LowRank(scaled @ u[:, :r], u[:, :r].T / root)

    return Spectrum(shape, at, _tails(saved), float(saved.sum()), functional=felt is None)


def energy_of(delta: Tensor, second: Tensor) -> float:
    """E||Delta z||^2 of a (out, in) map, or of a table (rows, width) with the shares of its rows."""
    image = second[:, None] * delta if second.dim() == 1 else delta @ second
    return float((image * delta).sum())


def _tails(saved: Tensor) -> NDArray[np.float64]:
    """What is lost at r = 0..k when direction i saves saved[i]."""
    return np.append(np.cumsum(saved.cpu().numpy()[::-1])[::-1], 0.0)


def of_rank(spectra: Sequence[Spectrum], rank: int | None) -> list[int | None]:
    """The same rank for every matrix; None for dense."""
    return [None if rank is None else s.sensible(rank) for s in spectra]


def by_energy(spectra: Sequence[Spectrum], share: float) -> list[int | None]:
    """For each matrix the smallest rank that keeps this share of its update's energy."""
    return [s.sensible(int(np.argmax(s.error <= (1.0 - share) * s.energy))) for s in spectra]


def by_budget(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """Ranks that store at most `budget` numbers together, given out where a number saves most error.

    Greedy: again and again the step (some more directions of one matrix, or its dense update) with the largest fall of
    worth * error per number among those that fit. With steps of equal cost this is the best there is.
    """
    options = [[*(r for r in range(len(s.error)) if s.sensible(r) == r), None] for s in spectra]
    costs = [np.array([s.cost(r) for r in ranks]) for s, ranks in zip(spectra, options, strict=True)]
    errors = [s.worth * np.append(s.error[: len(ranks) - 1], 0.0) for s, ranks in zip(spectra, options, strict=True)]
    at, left = [0] * len(spectra), budget
    queue = [step for i in range(len(spectra)) if (step := _step(i, 0, costs[i], errors[i], left))]
    heapq.heapify(queue)
    while queue:
        _, i, to = heapq.heappop(queue)
        cost = int(costs[i][to] - costs[i][at[i]])
        if cost <= left:
            at[i], left = to, left - cost
        if step := _step(i, at[i], costs[i], errors[i], left):
            heapq.heappush(queue, step)
    return [ranks[place] for ranks, place in zip(options, at, strict=True)]


def _step(
    i: int, at: int, cost: NDArray[np.int64], error: NDArray[np.float64], left: int
) -> tuple[float, int, int] | None:
    """The best step of matrix i from option `at` that fits: (-gain per number, i, its end), or None."""
    price, gain = cost[at + 1 :] - cost[at], error[at] - error[at + 1 :]
    rate = np.where((price <= left) & (gain > 0), gain / price, 0.0)
    return (-float(rate.max()), i, at + 1 + int(rate.argmax())) if rate.size and rate.max() > 0 else None
