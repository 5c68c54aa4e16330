"""The directions in which the inputs of a matrix lie: what must not be touched if old outputs are to stay.

A change D of a weight leaves its outputs on old inputs z as they were if D z = 0: if the rows of D are orthogonal to
the space that the inputs span (Saha et al. 2021, arXiv 2103.09762).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flame_moe.continual.moments import Moment
from flame_moe.errors import CheckpointError
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix


class Subspaces:
    """An orthonormal basis of protected input directions for every matrix of every weight that inputs have reached.

    Attributes:
        bases: "<weight>|<matrix of the stack>" -> (in, k) float32 with orthonormal columns; of a table of which rows
            are picked "<weight>|rows" -> (rows,) float32, 1 for a row that was picked.
    """

    def __init__(self, bases: Mapping[str, Tensor] | None = None) -> None:
        self.bases = dict(bases or {})

    def extend(self, moments: Mapping[str, Moment], threshold: float) -> None:
        """Take in the inputs of a stage: as few new directions as make the bases hold a share of their energy."""
        for name, moment in moments.items():
            if moment.one_hot:
                picked = (moment.second[0] > 0).float().cpu()
                self.bases[f"{name}|rows"] = torch.maximum(picked, self.bases.get(f"{name}|rows", picked))
                continue
            for which, second in enumerate(moment.second.cpu()):
                key = f"{name}|{which}"
                basis = self.bases.get(key, torch.zeros(len(second), 0))
                self.bases[key] = extended(basis, second, threshold)

    def projector(self, name: str, matrix: StackedMatrix) -> Tensor | None:
        """(..., in, in) float32 onto the protected directions; None where nothing of a weight is protected.

        Exactly the identity where all directions are: what is left of a change is then 0, not its rounding, which an
        optimizer that scales every entry (Adam) would take for a gradient.
        """
        own = [self.bases.get(f"{name}|{which}") for which in range(matrix.matrices)]
        width = matrix.shape[-1]
        if all(basis is None or basis.shape[1] == 0 for basis in own):
            return None
        onto = torch.stack([torch.zeros(width, width) if m is None else _onto(m) for m in own])
        return onto.view(*matrix.shape[:-2], width, width)

    def rows(self, name: str) -> Tensor | None:
        """(rows,) of a table: 1 where a row is protected; None where none is, or for what is no table."""
        return self.bases.get(f"{name}|rows")

    def check(self, model: Flame) -> None:
        """Insist that the bases are of this model's weights.

        Raises:
            CheckpointError: naming the first that is not.
        """
        matrices = {name: part for name, part in model.named_modules() if isinstance(part, StackedMatrix)}
        for key, basis in self.bases.items():
            name, which = key.rsplit("|", 1)
            side = -2 if which == "rows" else -1
            if name not in matrices or matrices[name].shape[side] != len(basis):
                raise CheckpointError(f"the protected directions '{key}' do not fit the model")


def extended(basis: Tensor, second: Tensor, threshold: float) -> Tensor:
    """A basis with the fewest further directions that make it hold a share of the energy of some inputs.

    The share that M holds of inputs with second moment C is tr(M^T C M) / tr(C); further directions are eigenvectors
    of (I - M M^T) C (I - M M^T), largest first (Saha et al. 2021).

    Args:
        basis: M, (in, k), orthonormal columns.
        second: C, (in, in).
        threshold: the share.
    """
    m, c = basis.double(), second.double()
    total = float(c.trace())
    held = float(((c @ m) * m).sum())
    if total <= 0 or held >= threshold * total:
        return basis
    values, vectors = torch.linalg.eigh(_outside(m, c))
    gained = values.flip(0).clamp(min=0).cumsum(0)
    count = int((held + gained < threshold * total).sum()) + 1
    # Directions without energy may lie in M, and are no new ones.
    count = min(count, int((values > 1e-14 * total).sum()), len(c) - m.shape[1])
    new = vectors.flip(1)[:, :count]
    # Once more, so that rounding does not add up over stages.
    new = torch.linalg.qr(new - m @ (m.T @ new)).Q
    return torch.cat([m, new], dim=1).float()


def free_directions(basis: Tensor | None, second: Tensor, rank: int) -> Tensor:
    """Rows (rank, in), orthonormal and orthogonal to a basis, along which some inputs have most energy.

    Where fewer are left, the last rows are zero.
    """
    width = len(second)
    m = torch.zeros(width, 0, dtype=torch.float64) if basis is None else basis.double()
    c = second.double()
    # Directions that no input has taken come after all others and before those of the basis.
    eye = torch.eye(width, dtype=torch.float64)
    vectors = torch.linalg.eigh(_outside(m, c + 1e-9 * (1 + float(c.trace()) / width) * eye)).eigenvectors
    rows = vectors.flip(1)[:, : min(rank, width - m.shape[1])].T
    return torch.cat([rows, torch.zeros(rank - len(rows), width, dtype=torch.float64)]).float()


def _onto(basis: Tensor) -> Tensor:
    """M M^T, computed in float64 so that its float32 bits do not depend on where or in which order the basis lies."""
    if basis.shape[1] == len(basis):
        return torch.eye(len(basis))
    m = basis.double()
    return (m @ m.T).float()


def _outside(m: Tensor, c: Tensor) -> Tensor:
    """(I - M M^T) C (I - M M^T)."""
    left = c - m @ (m.T @ c)
    return left - (left @ m) @ m.T
