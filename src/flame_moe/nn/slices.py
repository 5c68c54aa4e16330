"""What a stage leaves in a weight: an update of low rank, of a rank of its own for each matrix of a stack, or dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """An update A @ B with the singular values folded into one factor.

    Attributes:
        a: (..., out, r).
        b: (..., r, in).
    """

    a: Tensor
    b: Tensor

    def dense(self) -> Tensor:
        """(..., out, in)."""
        return self.a @ self.b


class Ragged(NamedTuple):
    """Updates of a stack of E matrices, each of a rank of its own. Nothing is padded: every number stored is live.

    Attributes:
        ranks: E ranks in the order of the stack; None is a matrix whose update is dense.
        a: (out, R) with R the sum of the ranks, the columns of one matrix after those of the one before it.
        b: (R, in), its rows in the same order.
        whole: (D, out, in) the dense ones.
    """

    ranks: tuple[int | None, ...]
    a: Tensor
    b: Tensor
    whole: Tensor

    def dense(self) -> Tensor:
        """(E, out, in)."""
        sizes = [rank or 0 for rank in self.ranks]
        factors = zip(self.a.split(sizes, dim=1), self.b.split(sizes, dim=0), strict=True)
        whole = iter(self.whole)
        return torch.stack([next(whole) if r is None else a @ b for r, (a, b) in zip(self.ranks, factors, strict=True)])


Slice = LowRank | Ragged | Tensor | None
Kind = int | str | list[int | None]
"""JSON-ready shape of a slice: the rank of all its matrices, "dense", or a rank (null: dense) for each of them."""


def pack(parts: Sequence[LowRank | Tensor | None], shape: torch.Size) -> Slice:
    """The simplest slice of a weight of `shape` (..., out, in) that holds these updates of its matrices, in order.

    Args:
        parts: one per matrix: factors (out, r), (r, in), a dense (out, in), or None where nothing is kept.
    """
    ranks = [0 if p is None else p.a.shape[-1] if isinstance(p, LowRank) else None for p in parts]
    low = [p for p in parts if isinstance(p, LowRank)]
    whole = [p for p in parts if isinstance(p, Tensor)]
    if not low and not whole:
        return None
    if len(whole) == len(parts):
        return torch.stack(whole).reshape(shape)
    if len(low) == len(parts) and len(set(ranks)) == 1:
        a, b = torch.stack([p.a for p in low]), torch.stack([p.b for p in low])
        return LowRank(a.reshape(*shape[:-1], -1), b.reshape(*shape[:-2], -1, shape[-1]))
    like = low[0].a if low else whole[0]
    out, width = shape[-2:]
    a = torch.cat([p.a for p in low], dim=1) if low else like.new_zeros(out, 0)
    b = torch.cat([p.b for p in low], dim=0) if low else like.new_zeros(0, width)
    return Ragged(tuple(ranks), a, b, torch.stack(whole) if whole else like.new_zeros(0, out, width))


def tensors(part: LowRank | Ragged | Tensor) -> dict[str, Tensor]:
    """The numbers of a slice by name: "a" and "b", "dense", or all three."""
    if isinstance(part, Tensor):
        return {"dense": part}
    if isinstance(part, LowRank):
        return {"a": part.a, "b": part.b}
    return {name: t for name, t in (("a", part.a), ("b", part.b), ("dense", part.whole)) if t.numel()}


def kind_of(part: LowRank | Ragged | Tensor) -> Kind:
    """The shape of a slice as it is written down."""
    if isinstance(part, Tensor):
        return "dense"
    return int(part.a.shape[-1]) if isinstance(part, LowRank) else list(part.ranks)


def assemble(kind: Kind, found: Mapping[str, Tensor], shape: torch.Size) -> LowRank | Ragged | Tensor:
    """The inverse of `kind_of` and `tensors`."""
    if isinstance(kind, str):
        return found["dense"]
    if isinstance(kind, int):
        return LowRank(found["a"], found["b"])
    like = next(iter(found.values()))
    empty = {"a": (shape[-2], 0), "b": (0, shape[-1]), "dense": (0, *shape[-2:])}
    a, b, whole = (found[name] if name in found else like.new_zeros(size) for name, size in empty.items())
    return Ragged(tuple(kind), a, b, whole)


def allocate(kind: Kind, shape: torch.Size, like: Tensor) -> LowRank | Ragged | Tensor:
    """A slice of this shape with any numbers, for a state dict to be loaded into; ValueError for an unknown kind."""
    *lead, out, width = shape
    if isinstance(kind, str):
        if kind != "dense":
            raise ValueError(f"a slice of kind '{kind}' is not known")
        return like.new_empty(shape)
    if isinstance(kind, int):
        return LowRank(like.new_empty((*lead, out, kind)), like.new_empty((*lead, kind, width)))
    total = sum(rank or 0 for rank in kind)
    dense = sum(rank is None for rank in kind)
    return Ragged(
        tuple(kind), like.new_empty(out, total), like.new_empty(total, width), like.new_empty(dense, out, width)
    )


def balanced(part: LowRank | Ragged | Tensor) -> LowRank | Ragged | Tensor:
    """The same update with the length of each direction shared evenly by its two factors, so that both train alike."""
    if isinstance(part, Tensor):
        return part
    long, wide = part.a.norm(dim=-2), part.b.norm(dim=-1)
    scale = torch.where((long > 0) & (wide > 0), (wide / long).sqrt(), 1.0)
    return part._replace(a=part.a * scale[..., None, :], b=part.b / scale[..., :, None])


def ranks_of(part: Slice, matrices: int) -> tuple[int | None, ...]:
    """Rank kept of each matrix of the stack: 0 where nothing is, None where the update is dense."""
    if part is None:
        return (0,) * matrices
    if isinstance(part, Ragged):
        return part.ranks
    return (None if isinstance(part, Tensor) else int(part.a.shape[-1]),) * matrices
