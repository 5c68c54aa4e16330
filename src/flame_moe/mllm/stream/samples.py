"""Instructions with their answers, and the pictures they speak of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


class Item(NamedTuple):
    """One instruction.

    Attributes:
        kind: name of the template that asked; ablations group by it.
        question, answer: words, separated by blanks.
        scene: what the picture shows, in words, for models that read text alone; empty where there is no picture.
        picture: (H, W, 3) 0..255, or None.
    """

    kind: str
    question: str
    answer: str
    scene: str = ""
    picture: Pixels | None = None


@dataclass(frozen=True)
class Samples:
    """Items of one task, either all with a picture or all without.

    Attributes:
        items: n kinds, questions, answers and scenes, without their pictures.
        pictures: (n, H, W, 3) uint8, or None.
    """

    items: tuple[Item, ...]
    pictures: Pixels | None = None

    @classmethod
    def of(cls, items: Iterable[Item]) -> Samples:
        """Of items that hold their pictures themselves."""
        held = list(items)
        pictures = [item.picture for item in held if item.picture is not None]
        bare = tuple(item._replace(picture=None) for item in held)
        if not pictures:
            return cls(bare)
        if len(pictures) != len(held):
            raise ValueError("either every item has a picture or none")
        return cls(bare, np.stack(pictures))

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: Sequence[int]) -> Samples:
        """Some of them."""
        pictures = None if self.pictures is None else self.pictures[list(rows)]
        return Samples(tuple(self.items[i] for i in rows), pictures)
