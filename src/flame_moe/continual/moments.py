"""What the weights are fed: the second moment of every matrix's inputs, in one streaming pass.

C = E[z z^T], not centred, over the inputs z that reach a matrix in evaluation mode: of an expert only the steps that
are routed to it, never padding, and of a convolution the neighbourhoods in the layout in which its kernel is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.data.loader import to_device
from flame_moe.nn.encoders.codes import StackedEmbedding
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix


class Moment(NamedTuple):
    """Inputs of each matrix of a stack of E (one, where nothing is stacked), in float64.

    Attributes:
        seen: (E,) how many inputs were seen.
        mean: (E, in) E[z]; zeros where none was seen.
        second: (E, in, in) E[z z^T]. Of a table of which rows are picked, (E, rows): how often each row is, which is
            the diagonal of the second moment of its one-hot inputs; all else in it is 0.
    """

    seen: Tensor
    mean: Tensor
    second: Tensor

    @property
    def one_hot(self) -> bool:
        """Whether inputs pick rows of a table: the map is then transposed, y = W^T z."""
        return self.second.dim() == 2


class Sums:
    """An observer that adds up the inputs of one weight.

    Args:
        stack: how many matrices it has.
        size: of their inputs; of a table, how many rows it has.
        table: whether inputs pick rows.
        device: where the sums are kept.
    """

    def __init__(self, stack: int, size: int, *, table: bool = False, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(stack, dtype=torch.float64, device=device)
        self.first = torch.zeros(stack, size, dtype=torch.float64, device=device)
        square = (stack, size) if table else (stack, size, size)
        self.second = torch.zeros(square, dtype=torch.float64, device=device)

    def rows(self, which: int | None, x: Tensor) -> None:
        """Inputs (n, size) of one matrix; for None (stack, n, size), of each."""
        x = x.float()
        here = slice(None) if which is None else which
        self.count[here] += x.shape[-2]
        self.first[here] += x.sum(-2)
        self.second[here] += x.mT @ x

    def picks(self, index: Tensor) -> None:
        """Rows that were picked."""
        seen = torch.bincount(index, minlength=self.first.shape[1])
        self.count[0] += len(index)
        self.first[0] += seen
        self.second[0] += seen

    def moment(self) -> Moment:
        """What the inputs seen so far say."""
        n = self.count.clamp(min=1.0)
        second = self.second / (n[:, None] if self.second.dim() == 2 else n[:, None, None])
        return Moment(self.count, self.first / n[:, None], second)


def gather(
    model: Flame, batches: Iterable[FlexiBatch], cursor: int, names: Iterable[str] | None = None
) -> dict[str, Moment]:
    """Second moments of the inputs of stacked matrices, at the weights of `cursor`, in evaluation mode.

    Args:
        model: the network; not changed.
        batches: what it is shown, one pass; the batches of several tasks may follow one another.
        cursor: stage whose weights are read.
        names: of the matrices; default all.

    Returns:
        name -> Moment, for every matrix that the batches reached.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode(), _watched(model, None if names is None else set(names)) as sums:
            for batch in batches:
                model(to_device(batch, device), cursor)
        return {name: part.moment() for name, part in sums.items() if bool(part.count.any())}
    finally:
        model.train(was_training)


def tables(model: Flame) -> set[StackedMatrix]:
    """Weights of which rows are picked, instead of being multiplied with."""
    return {module.weight for module in model.modules() if isinstance(module, StackedEmbedding)}


@contextmanager
def _watched(model: Flame, names: set[str] | None) -> Iterator[Mapping[str, Sums]]:
    picked = tables(model)
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, StackedMatrix)}
    chosen = {name: m for name, m in matrices.items() if names is None or name in names}
    sums = {name: _sums(m, table=m in picked) for name, m in chosen.items()}
    try:
        for name, matrix in chosen.items():
            matrix.observer = sums[name]
        yield sums
    finally:
        for matrix in chosen.values():
            matrix.observer = None


def _sums(matrix: StackedMatrix, *, table: bool) -> Sums:
    out, width = matrix.shape[-2:]
    return Sums(matrix.matrices, out if table else width, table=table, device=matrix.base.device)
