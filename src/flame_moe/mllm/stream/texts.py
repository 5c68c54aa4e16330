"""Tasks of text alone, for a language model that was trained elsewhere: the scenes of the generated tasks in words.

What a scene shows can be read off it, so each task has something that must be learned: code words for colours, the
parity of a digit, the order of bars, letters from the end, and sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flame_moe.mllm.stream.generated import COLORS, NUMBERS, generate
from flame_moe.mllm.stream.pictures import SHAPES
from flame_moe.mllm.stream.samples import Item, Samples

CODES = dict(zip(COLORS, ("zib", "wok", "fep", "lum", "dax", "tor", "gim", "hup"), strict=True))
"""Color -> the word that the task `code` teaches for it."""
_SIZE = 8
"""Of pictures, which are drawn and thrown away."""


def _code(item: Item) -> Item | None:
    color = item.scene.split()[-2]
    return Item("code", "what is the code ?", CODES[color], item.scene)


def _digit(item: Item) -> Item | None:
    return Item(item.kind, item.question, item.answer, item.scene) if item.kind != "digit" else None


def _chart(item: Item) -> Item | None:
    return Item(item.kind, item.question, item.answer, item.scene)


def _letters(item: Item) -> Item | None:
    word = item.scene.split()[3:]
    return Item("backwards", "spell it from the end", "-".join(word[::-1]), item.scene)


def _sum(item: Item) -> Item | None:
    return Item(item.kind, item.question, item.answer) if item.kind != "larger" else None


FORMS: dict[str, tuple[str, Callable[[Item], Item | None]]] = {
    "code": ("shapes", _code),
    "parity": ("digits", _digit),
    "bars": ("chart", _chart),
    "backwards": ("ocr", _letters),
    "sums": ("math", _sum),
}
"""Task -> the generated task whose scenes it uses, and its form of an item; None leaves the item out."""


def text_task(task: str, split: str, count: int) -> Samples:
    """The first `count` samples of a split of a text task, each only once outside training."""
    source, form = FORMS[task]
    found: dict[object, Item] = {}
    for i, item in enumerate(generate(source, split, 6 * count, _SIZE).items):
        made = form(item)
        if made is not None:
            found.setdefault(i if split == "train" else (made.question, made.scene), made)
    return Samples(tuple(found.values())[:count])


def text_foundation(count: int, split: str) -> Samples:
    """What the untouched model can do and should not lose: copy a word, read a colour, name a capital."""
    rng = np.random.default_rng(("val", "test").index(split))
    capitals = CAPITALS[::2] if split == "val" else CAPITALS[1::2]
    items = []
    for _ in range(count):
        kind = int(rng.integers(3))
        if kind == 0:
            word = str(rng.choice((*COLORS, *SHAPES, *NUMBERS)))
            items.append(Item("repeat", f"Repeat this word and say nothing else: {word}", word))
        elif kind == 1:
            color, form = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
            question = f"The {form} is {color}. What color is the {form}? Answer with one word."
            items.append(Item("read", question, color.capitalize()))
        else:
            place, name = capitals[int(rng.integers(len(capitals)))]
            items.append(Item("capital", f"What is the capital of {place}? Answer with one word.", name))
    return Samples(tuple(dict.fromkeys(items)))


CAPITALS = (
    *(("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Germany", "Berlin")),
    *(("Egypt", "Cairo"), ("Greece", "Athens"), ("Russia", "Moscow"), ("China", "Beijing"), ("Portugal", "Lisbon")),
)
