"""How much the loss feels an error in the outputs of each matrix.

An error e in the outputs y of a matrix changes the loss by about 1/2 E[(g . e)^2] at its minimum, g = dL/dy (the
empirical Fisher information, here with its diagonal over outputs). E[g_i^2] need not be gathered at the outputs: with
gradients g independent of the inputs z, as in Kronecker-factored curvature (Martens and Grosse 2015, arXiv 1503.05671),
row i of the weight's gradient has E||dL/dW_i||^2 = E[g_i^2] E||z||^2, and E||z||^2 is the trace of the inputs' moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flame_moe.data.loader import to_device
from flame_moe.nn.stacked import StackedMatrix

if TYPE_CHECKING:
    from flame_moe.continual.methods.base import StageContext


def squared_gradients(context: StageContext, parts: Mapping[str, StackedMatrix]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the stage's losses, summed over each row, in evaluation mode.

    Args:
        context: of the stage, whose updates are still dense and require a gradient.
        parts: the matrices that have such an update, by name.

    Returns:
        name -> (E, out) float64; of a table of which rows are picked, whose outputs are its columns, (1, in). Without
        the factor that all of them share, the number of samples in a batch.
    """
    from flame_moe.continual.moments import tables

    model = context.model
    picked = tables(model)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = {n: torch.zeros((), dtype=torch.float64, device=device) for n in parts}
    count = 0
    with torch.enable_grad():
        for problem, batch in context.sampled("truncation"):
            model.zero_grad(set_to_none=True)
            ready = to_device(batch, device)
            logits = model(ready, context.stage).logits
            (problem.task.weight * problem.losses(logits, ready.target).mean()).backward()
            count += 1
            for n, part in parts.items():
                if part.delta is not None and part.delta.grad is not None:
                    square = part.delta.grad.double().square().reshape(-1, *part.shape[-2:])
                    sums[n] = sums[n] + (square.sum(-2) if part in picked else square.sum(-1))
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    found = {}
    for n, part in parts.items():
        outputs = part.shape[-1] if part in picked else part.shape[-2]
        found[n] = (sums[n] / max(count, 1)).expand(part.matrices, outputs)
    return found
