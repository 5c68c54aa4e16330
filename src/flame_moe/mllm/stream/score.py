"""Exact match, the share of samples whose whole answer, its end included, is what greedy generation would say; and the
cross-entropy of the answers.

One forward pass over prompt and answer is enough: if every token of the answer is the most likely one after those
before it, greedy generation writes exactly these tokens; if one is not, it writes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flame_moe.mllm.stream.encode import IGNORED, Batch, Encoded

Answer = Callable[[Batch], Tensor]
"""Inputs -> logits (B, L, vocabulary), or only of the tokens that are wanted, (B, wanted, vocabulary)."""


def ask(model: Any, batch: Batch) -> Tensor:
    """Logits of the tokens of a batch that are wanted."""
    inputs = {"inputs_embeds": batch.embeds, "attention_mask": batch.mask}
    return model(**inputs, use_cache=False, logits_to_keep=batch.wanted).logits


class Graded(NamedTuple):
    """How samples are answered.

    Attributes:
        right: (n,) bool, exactly.
        nats: (n,) mean cross-entropy over the tokens of the answer, in nats.
    """

    right: Tensor
    nats: Tensor


@torch.no_grad()
def exact(answer: Answer, samples: Encoded, embedding: nn.Module, size: int = 128) -> Tensor:
    """(n,) bool: which samples are answered exactly."""
    right = torch.zeros(len(samples), dtype=torch.bool)
    for which, logits, wanted in _asked(answer, samples, embedding, size):
        right[which] = _right(logits, wanted)
    return right


@torch.no_grad()
def graded(answer: Answer, samples: Encoded, embedding: nn.Module, size: int = 128) -> Graded:
    """Which samples are answered exactly, and how unlikely the model finds the answers."""
    found = Graded(torch.zeros(len(samples), dtype=torch.bool), torch.zeros(len(samples)))
    for which, logits, wanted in _asked(answer, samples, embedding, size):
        found.right[which] = _right(logits, wanted)
        each = nn.functional.cross_entropy(logits.float().mT, wanted, ignore_index=IGNORED, reduction="none")
        found.nats[which] = (each.sum(-1) / (wanted != IGNORED).sum(-1)).cpu()
    return found


def _asked(
    answer: Answer, samples: Encoded, embedding: nn.Module, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which samples, the logits of their answers' tokens (B, T, vocabulary), and those tokens (B, T)."""
    for which, batch in samples.batches(size, embedding):
        asked = batch.answers
        yield which, answer(asked)[:, -asked.wanted : -1], asked.labels[:, 1:]


def _right(logits: Tensor, wanted: Tensor) -> Tensor:
    return ((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(-1).cpu()


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of the answers.

    Args:
        logits: (B, L, vocabulary).
        labels: (B, L) as in `Batch`.
    """
    wanted = labels[:, 1:]
    here = wanted != IGNORED
    return nn.functional.cross_entropy(logits[:, :-1][here].float(), wanted[here])
