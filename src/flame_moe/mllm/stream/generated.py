"""The five generated tasks: shapes, digits, chart, ocr and math. Nothing is read from the network or the disk.

Pictures are drawn anew for every sample. What could be learned by heart is kept apart: a handwritten digit, a word of
two or more letters and a pair of numbers belong to one split only. Handwriting is that of scikit-learn's digits (UCI
Optical Recognition of Handwritten Digits, CC BY 4.0); the questions about shapes follow those of easy-VQA (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from flame_moe.mllm.stream import pictures
from flame_moe.mllm.stream.samples import Item, Samples

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
ALPHABET = tuple(pictures.GLYPHS)
COLORS = tuple(pictures.COLORS)
LEVELS = 8
"""Heights that a bar of a chart can have."""
_SHARE = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
_DIGITS = {"train": (0, 1100), "val": (1100, 1300), "test": (1300, 1797)}
Draw = Callable[[Generator, str, int], Item]


def shapes(rng: Generator, split: str, size: int) -> Item:
    """What shape, what color, is there such a one: of one filled form."""
    form, color = str(rng.choice(pictures.SHAPES)), str(rng.choice(COLORS))
    picture, scene = pictures.shape(rng, size, form, color), f"the picture shows a {color} {form}"
    kind = str(rng.choice(("shape", "color", "exists")))
    if kind == "shape":
        return Item(kind, "what shape is in the image ?", form, scene, picture)
    if kind == "color":
        return Item(kind, "what color is the shape ?", color, scene, picture)
    asked_form, asked_color = form, color
    answer = "yes" if rng.random() < 0.5 else "no"
    while answer == "no" and (asked_form, asked_color) == (form, color):
        asked_form = str(rng.choice((form, *pictures.SHAPES)))
        asked_color = str(rng.choice((color, *COLORS)))
    return Item(kind, f"is there a {asked_color} {asked_form} ?", answer, scene, picture)


def digits(rng: Generator, split: str, size: int) -> Item:
    """What digit, is it even, is it larger: of one handwritten digit."""
    strokes, digit = handwritten(rng, split)
    picture, scene = pictures.handwriting(rng, size, strokes), f"the picture shows the digit {NUMBERS[digit]}"
    kind = str(rng.choice(("digit", "even", "larger")))
    if kind == "digit":
        return Item(kind, "what digit is this ?", NUMBERS[digit], scene, picture)
    if kind == "even":
        return Item(kind, "is the digit even ?", "no" if digit % 2 else "yes", scene, picture)
    than = int(rng.integers(0, 10))
    return Item(kind, f"is the digit larger than {NUMBERS[than]} ?", "yes" if digit > than else "no", scene, picture)


def chart(rng: Generator, split: str, size: int) -> Item:
    """The highest, the lowest, how many, is one higher than another: of two to four coloured bars."""
    colors, heights = bars(rng)
    picture = pictures.bars(rng, size, colors, heights, LEVELS)
    scene = "the chart has bars " + " , ".join(f"{c} {NUMBERS[h]}" for c, h in zip(colors, heights, strict=True))
    kind = str(rng.choice(("highest", "lowest", "count", "higher")))
    order = [colors[i] for i in np.argsort(heights)]
    if kind == "highest":
        return Item(kind, "which bar is the highest ?", order[-1], scene, picture)
    if kind == "lowest":
        return Item(kind, "which bar is the lowest ?", order[0], scene, picture)
    if kind == "count":
        return Item(kind, "how many bars are there ?", NUMBERS[len(colors)], scene, picture)
    one, other = rng.choice(colors, 2, replace=False)
    answer = "yes" if order.index(str(one)) > order.index(str(other)) else "no"
    return Item(kind, f"is the {one} bar higher than the {other} bar ?", answer, scene, picture)


def ocr(rng: Generator, split: str, size: int) -> Item:
    """The first letter, the last, how many, the whole word: of one to three drawn letters."""
    word = written(rng, split)
    picture, scene = pictures.letters(rng, size, word), "the sign says " + " ".join(word)
    kind = str(rng.choice(("first", "last", "count", "word")))
    if kind == "first":
        return Item(kind, "what is the first letter ?", word[0], scene, picture)
    if kind == "last":
        return Item(kind, "what is the last letter ?", word[-1], scene, picture)
    if kind == "count":
        return Item(kind, "how many letters are there ?", NUMBERS[len(word)], scene, picture)
    return Item(kind, "what word is written ?", " ".join(word), scene, picture)


def math_text(rng: Generator, split: str, size: int) -> Item:
    """Plus, minus and the larger of two numbers up to twenty, in words and without a picture."""
    kind = str(rng.choice(("plus", "minus", "larger")))
    a, b = (int(x) for x in rng.choice(_pairs(split, kind)))
    if kind == "plus":
        return Item(kind, f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b])
    if kind == "minus":
        return Item(kind, f"what is {NUMBERS[a]} minus {NUMBERS[b]} ?", NUMBERS[a - b])
    return Item(kind, f"which is larger {NUMBERS[a]} or {NUMBERS[b]} ?", NUMBERS[max(a, b)])


TASKS: dict[str, Draw] = {"shapes": shapes, "digits": digits, "chart": chart, "ocr": ocr, "math": math_text}
"""Task -> how one of its samples is drawn."""


def generate(task: str, split: str, count: int, size: int) -> Samples:
    """The first `count` samples of a split of a task, the same in every run; without pictures each only once.

    Args:
        task: of `TASKS`.
        split: train, val or test.
        count: how many at most; of a task without pictures there are only so many.
        size: of pictures, in pixels.
    """
    rng = np.random.default_rng([list(TASKS).index(task), list(_SHARE).index(split), size])
    items: dict[object, Item] = {}
    for draw in range(20 * count):
        item = TASKS[task](rng, split, size)
        items.setdefault(item.question if item.picture is None and split != "train" else draw, item)
        if len(items) == count:
            break
    return Samples.of(items.values())


def bars(rng: Generator) -> tuple[list[str], list[int]]:
    """Different colours and different heights of two to four bars."""
    count = int(rng.integers(2, 5))
    colors = [str(c) for c in rng.choice(COLORS, count, replace=False)]
    return colors, [int(h) for h in 1 + rng.choice(LEVELS, count, replace=False)]


def handwritten(rng: Generator, split: str) -> tuple[pictures.Grey, int]:
    """A digit of a split, (8, 8) in 0..1, and which it is."""
    strokes, labels = _digit_set()
    row = int(rng.integers(*_DIGITS[split]))
    return strokes[row], int(labels[row])


def written(rng: Generator, split: str) -> str:
    """A word of one to three letters; those of two or more are of the split alone."""
    length = int(rng.integers(1, 4))
    if length == 1:
        return str(rng.choice(ALPHABET))
    words = _words(split, length)
    return words[int(rng.integers(len(words)))]


@cache
def _digit_set() -> tuple[pictures.Grey, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images / 16.0, found.target


@cache
def _words(split: str, length: int) -> list[str]:
    words = [""]
    for _ in range(length):
        words = [word + letter for word in words for letter in ALPHABET]
    return [words[i] for i in _part(split, len(words))]


@cache
def _pairs(split: str, kind: str) -> NDArray[np.int64]:
    top = len(NUMBERS) - 1
    pairs = [(a, b) for a in range(top + 1) for b in range(top + 1)]
    rule: dict[str, Callable[[int, int], bool]] = {
        "plus": lambda a, b: a + b <= top,
        "minus": lambda a, b: a >= b,
        "larger": lambda a, b: a != b,
    }
    fit = [pair for pair in pairs if rule[kind](*pair)]
    return np.array([fit[i] for i in _part(split, len(fit))])


def _part(split: str, count: int) -> NDArray[np.int64]:
    """The places of a split among `count` things, shuffled once and for all."""
    low, high = _SHARE[split]
    return np.random.default_rng(count).permutation(count)[math.floor(low * count) : math.floor(high * count)]
