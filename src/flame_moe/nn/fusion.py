"""Task heads: read every present modality out, put a learned vector in place of an absent one, concatenate, predict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flame_moe.nn.dropout import dropout
from flame_moe.nn.moe import Sequences
from flame_moe.nn.pooling import READOUTS
from flame_moe.schema import Task


class Head(nn.Module):
    """logits = Linear(LayerNorm(concat over the task's modalities of read-out or absent vector)).

    The order of modalities is the task's own and is stored with it.

    Args:
        task: modalities and outputs.
        width: d.
        readout: "last", "mean" or "attention", all over steps that exist.
        dropout: rate on the fused vector.
    """

    def __init__(self, task: Task, width: int, readout: str, dropout: float) -> None:
        super().__init__()
        self.modalities, self.readout, self.dropout = task.modalities, readout, dropout
        m = len(task.modalities)
        self.absent = nn.Parameter(torch.randn(m, width) * 0.02)
        self.query = nn.Parameter(torch.zeros(m, width)) if readout == "attention" else None
        self.norm = nn.LayerNorm(m * width)
        self.linear = nn.Linear(m * width, task.outputs)

    def forward(self, inputs: Mapping[str, Sequences], rows: Mapping[str, Tensor], size: int) -> Tensor:
        """Fuse and predict.

        Args:
            inputs: modality -> Sequences of the n samples that have it.
            rows: modality -> (n,) their positions in the batch.
            size: B.

        Returns:
            (B, outputs).
        """
        parts = []
        for j, name in enumerate(self.modalities):
            part = self.absent[j].expand(size, -1)
            if name in inputs:
                x, mask = inputs[name]
                pooled = READOUTS[self.readout](x, mask, None if self.query is None else self.query[j])
                part = part.index_copy(0, rows[name], pooled.to(part.dtype))
            parts.append(part)
        fused = self.norm(torch.cat(parts, dim=1))
        return self.linear(dropout(fused, self.dropout, self.training))
