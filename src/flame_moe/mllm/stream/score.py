"""Exact match: the share of samples whose whole answer, its end included, is what greedy generation would say.

One forward pass over prompt and answer is enough: if every token of the answer is the most likely one after those
before it, greedy generation writes exactly these tokens; if one is not, it writes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flame_moe.mllm.stream.encode import IGNORED, Batch, Encoded

Answer = Callable[[Batch], Tensor]
"""Inputs -> logits (B, L, vocabulary), or only of the tokens that are wanted, (B, wanted, vocabulary)."""


def ask(model: Any, batch: Batch) -> Tensor:
    """Logits of the tokens of a batch that are wanted."""
    inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
    return model(**inputs, use_cache=False, logits_to_keep=batch.wanted).logits


@torch.no_grad()
def exact(answer: Answer, samples: Encoded, embedding: nn.Module, size: int = 128) -> Tensor:
    """(n,) bool: which samples are answered exactly."""
    right = torch.zeros(len(samples), dtype=torch.bool)
    for which, batch in samples.batches(size, embedding):
        asked = batch.answers
        said = answer(asked)[:, -asked.wanted : -1].argmax(-1)
        wanted = asked.labels[:, 1:]
        right[which] = ((said == wanted) | (wanted == IGNORED)).all(-1).cpu()
    return right


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of the answers.

    Args:
        logits: (B, L, vocabulary).
        labels: (B, L) as in `Batch`.
    """
    wanted = labels[:, 1:]
    here = wanted != IGNORED
    return nn.functional.cross_entropy(logits[:, :-1][here].float(), wanted[here])
