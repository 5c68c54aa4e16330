"""What the base model learns before the stream, and what later tasks must not cost it: other questions, other words.

The foundation shares pictures and words with the tasks, but no question: it describes, reads, lists, orders, repeats,
counts on and checks claims. Every word that tasks answer with is an answer here too: embeddings stay frozen later, and
those of words that were never said are too much alike to be told apart ("yes" and "no" then stay at chance).

Its accuracy after each stage is the second measure of forgetting (arXiv 2511.01831, where it is ChartQA, MMBench and
DocVQA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.random import Generator

from flame_moe.mllm.stream import pictures
from flame_moe.mllm.stream.generated import COLORS, LEVELS, NUMBERS, bars, handwritten, written
from flame_moe.mllm.stream.samples import Item, Samples

DESCRIBE = "describe the picture"


def shape_skill(rng: Generator, split: str, size: int) -> Item:
    """Describe a form, name it, or say whether a statement about it is true."""
    form, color = str(rng.choice(pictures.SHAPES)), str(rng.choice(COLORS))
    picture, scene = pictures.shape(rng, size, form, color), f"the picture shows a {color} {form}"
    kind = int(rng.integers(3))
    if kind == 0:
        return Item("shape describe", DESCRIBE, f"a {color} {form}", scene, picture)
    if kind == 1:
        return Item("shape name", "name the object", form, scene, picture)
    true = rng.random() < 0.5
    said = color if true else str(rng.choice([c for c in COLORS if c != color]))
    return Item("shape claim", f"is it so : the object is {said}", "yes" if true else "no", scene, picture)


def digit_skill(rng: Generator, split: str, size: int) -> Item:
    """Describe a handwritten digit, or read it."""
    strokes, digit = handwritten(rng, split)
    picture, scene = pictures.handwriting(rng, size, strokes), f"the picture shows the digit {NUMBERS[digit]}"
    if rng.random() < 0.5:
        return Item("digit describe", DESCRIBE, f"the digit {NUMBERS[digit]}", scene, picture)
    return Item("digit read", "read the number", NUMBERS[digit], scene, picture)


def chart_skill(rng: Generator, split: str, size: int) -> Item:
    """List the bars from the left, order them by height, or say whether a colour is there."""
    colors, heights = bars(rng)
    picture = pictures.bars(rng, size, colors, heights, LEVELS)
    scene = "the chart has bars " + " , ".join(f"{c} {NUMBERS[h]}" for c, h in zip(colors, heights, strict=True))
    kind = int(rng.integers(3))
    if kind == 0:
        return Item("chart list", "list the bars", " ".join(colors), scene, picture)
    if kind == 1:
        ordered = [colors[i] for i in np.argsort(heights)]
        return Item("chart order", "order the bars", " ".join(ordered), scene, picture)
    true = rng.random() < 0.5
    said = str(rng.choice(colors if true else [c for c in COLORS if c not in colors]))
    return Item("chart claim", f"is it so : one bar is {said}", "yes" if true else "no", scene, picture)


def letter_skill(rng: Generator, split: str, size: int) -> Item:
    """Describe a sign, or spell it backwards."""
    word = written(rng, split)
    picture, scene = pictures.letters(rng, size, word), "the sign says " + " ".join(word)
    if rng.random() < 0.6:
        return Item("letter describe", DESCRIBE, "the sign " + " ".join(word), scene, picture)
    return Item("letter spell", "spell it backwards", " ".join(word[::-1]), scene, picture)


def text_skill(rng: Generator, split: str, size: int) -> Item:
    """Repeat words, count on, or order two numbers."""
    kind = int(rng.integers(3))
    if kind == 0:
        said = " ".join(str(w) for w in rng.choice((*COLORS, *NUMBERS), int(rng.integers(1, 4))))
        return Item("text repeat", f"repeat : {said}", said)
    if kind == 1:
        start = int(rng.integers(0, len(NUMBERS) - 3))
        return Item("text count", f"count on from {NUMBERS[start]}", " ".join(NUMBERS[start + 1 : start + 4]))
    low, high = sorted(int(x) for x in rng.choice(len(NUMBERS), 2, replace=False))
    pair = (low, high) if rng.random() < 0.5 else (high, low)
    said = " ".join(NUMBERS[x] for x in pair)
    return Item("text order", f"order : {said}", f"{NUMBERS[low]} {NUMBERS[high]}")


SKILLS: dict[str, Callable[[Generator, str, int], Item]] = {
    "shapes": shape_skill,
    "digits": digit_skill,
    "chart": chart_skill,
    "ocr": letter_skill,
    "math": text_skill,
}
"""Task of the stream -> the foundation's skill about the same pictures."""


def foundation(split: str, count: int, size: int, tasks: Iterable[str]) -> dict[str, Samples]:
    """About `count` samples of a split, in equal parts over the skills of some tasks: skill -> samples."""
    chosen = [task for task in SKILLS if task in set(tasks)]
    found = {}
    for task in chosen:
        rng = np.random.default_rng([100 + list(SKILLS).index(task), ("train", "val", "test").index(split), size])
        found[task] = Samples.of(SKILLS[task](rng, split, size) for _ in range(count // len(chosen)))
    return found
