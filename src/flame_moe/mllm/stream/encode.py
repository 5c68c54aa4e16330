"""Samples as tensors: token ids, what is asked and what is answered, and the cached features of the pictures.

The vision tower and the projector are frozen, so the features of a picture are computed once. What is batched are then
the inputs of the language model, embeddings: a method never reads a pixel again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flame_moe.mllm.stream.samples import Item
from flame_moe.mllm.stream.words import Reader

IGNORED = -100
"""Label of a token that is not part of the answer."""


class Tokens(NamedTuple):
    """Token ids, padded on the right.

    Attributes:
        ids: (B, L).
        pictures: (B, L) bool, the places of picture features.
        mask, labels, prompt: as in `Batch`.
    """

    ids: Tensor
    pictures: Tensor
    mask: Tensor
    labels: Tensor
    prompt: Tensor


class Batch(NamedTuple):
    """Inputs of the language model, padded on the right.

    Attributes:
        embeds: (B, L, width).
        mask: (B, L) 1 for tokens, 0 for padding.
        labels: (B, L) token ids of the answer, `IGNORED` elsewhere.
        prompt: (B, L) bool, the tokens before the answer.
        wanted: of how many tokens at the end the logits are wanted; 0 for all.
    """

    embeds: Tensor
    mask: Tensor
    labels: Tensor
    prompt: Tensor
    wanted: int = 0

    @property
    def answers(self) -> Batch:
        """The same, with logits of what is needed to say the answers alone, and their labels (B, wanted).

        Prompts get none: of a language model with a large vocabulary logits are a fifth of the work.
        """
        length = self.labels.shape[1]
        first = int((self.labels != IGNORED).any(0).int().argmax())
        wanted = min(length, length - first + 1)
        return self._replace(labels=self.labels[:, -wanted:], wanted=wanted)

    def take(self, rows: Tensor) -> Batch:
        """Some of its samples."""
        embeds, mask, labels, prompt = (part[rows] for part in (self.embeds, self.mask, self.labels, self.prompt))
        return Batch(embeds, mask, labels, prompt, self.wanted)


@dataclass(frozen=True)
class Encoded:
    """Samples of one or several tasks.

    Attributes:
        items: n of them.
        ids: (n, L) token ids, padded on the right.
        starts: (n,) length of the prompt.
        ends: (n,) length of prompt and answer.
        rows: (n,) place of the picture in `features`, -1 without one.
        features: (m, patches, width) of the pictures, projected into the language model.
        image: the id that pictures stand for.
    """

    items: tuple[Item, ...]
    ids: Tensor
    starts: Tensor
    ends: Tensor
    rows: Tensor
    features: Tensor
    image: int

    def __len__(self) -> int:
        return len(self.items)

    def tokens(self, which: Tensor) -> Tokens:
        """Some samples without their embeddings."""
        ends, starts = self.ends[which], self.starts[which]
        ids = self.ids[which, : int(ends.max())]
        place = torch.arange(ids.shape[1])
        mask = (place < ends[:, None]).long()
        labels = torch.where((place >= starts[:, None]) & (mask > 0), ids, IGNORED)
        return Tokens(ids, ids == self.image, mask, labels, place < starts[:, None])

    def shown(self, which: Tensor) -> Tensor:
        """Features of the pictures of some samples, in their order; those without a picture have none."""
        rows = self.rows[which]
        return self.features[rows[rows >= 0]]

    def batch(self, which: Tensor, embedding: nn.Module) -> Batch:
        """Some samples, with the embeddings of the words put in; no gradient reaches these. It is where the embedding
        is; the samples stay in main memory."""
        ids, pictures, *rest = self.tokens(which)
        device = next(embedding.parameters()).device
        with torch.no_grad():
            embeds = embedding(ids.masked_fill(pictures, 0).to(device))
            if bool(pictures.any()):
                embeds = embeds.masked_scatter(pictures.unsqueeze(-1).to(device), self.shown(which).to(embeds))
        mask, labels, prompt = (part.to(device) for part in rest)
        return Batch(embeds, mask, labels, prompt)

    def batches(self, size: int, embedding: nn.Module) -> Iterator[tuple[Tensor, Batch]]:
        """All samples once, those of like length together: (rows, batch)."""
        for which in torch.argsort(self.ends, stable=True).split(size):
            yield which, self.batch(which, embedding)

    def take(self, which: Sequence[int]) -> Encoded:
        """Some of them, with the same store of features."""
        places = torch.as_tensor(list(which), dtype=torch.long)
        held = tuple(self.items[i] for i in places.tolist())
        one = (self.ids[places], self.starts[places], self.ends[places], self.rows[places])
        return Encoded(held, *one, self.features, self.image)


def encode(items: Sequence[Item], reader: Reader, features: Tensor | None) -> Encoded:
    """Token ids of items.

    Args:
        items: n of them.
        reader: of the model.
        features: (n, patches, width), or None for items without pictures.
    """
    patches = 0 if features is None else features.shape[1]
    prompts = [reader.prompt(item, patches) for item in items]
    return encode_ids(items, prompts, [reader.answer(item) for item in items], reader, features)


def encode_ids(
    items: Sequence[Item],
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    reader: Reader,
    features: Tensor | None = None,
) -> Encoded:
    """The same of items whose prompts and answers are token ids already."""
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ends = torch.tensor([len(row) for row in whole])
    ids = torch.full((len(whole), int(ends.max())), reader.pad)
    for i, row in enumerate(whole):
        ids[i, : len(row)] = torch.tensor(row)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.full((len(whole),), -1) if features is None else torch.arange(len(whole))
    held = torch.zeros(0, 0, 0) if features is None else features
    return Encoded(tuple(items), ids, starts, ends, rows, held, reader.image)


def together(parts: Sequence[Encoded]) -> Encoded:
    """Samples of several tasks as one set, in the order given."""
    length = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([nn.functional.pad(part.ids, (0, length - part.ids.shape[1])) for part in parts])
    rows, held, known = [], [], 0
    for part in parts:
        rows.append(torch.where(part.rows < 0, part.rows, part.rows + known))
        if len(part.features):
            held.append(part.features)
            known += len(part.features)
    one = (torch.cat([p.starts for p in parts]), torch.cat([p.ends for p in parts]), torch.cat(rows))
    features = torch.cat(held) if held else torch.zeros(0, 0, 0)
    return Encoded(tuple(i for part in parts for i in part.items), ids, *one, features, parts[0].image)


def shuffled(count: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows of `steps` batches: every sample once before any comes again, in a new order each time."""
    queue: list[int] = []
    size = min(size, count)
    for _ in range(steps):
        if len(queue) < size:
            queue = [*queue, *rng.permutation(count).tolist()]
        yield torch.tensor(queue[:size])
        queue = queue[size:]
