"""Small pictures drawn with numpy alone, so that they are the same on every machine: (size, size, 3) uint8."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from flame_moe.mllm.stream.samples import Pixels

Grey = NDArray[np.float64]

COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (225, 20, 20),
    "blue": (20, 40, 230),
    "green": (10, 150, 20),
    "teal": (0, 150, 150),
    "brown": (130, 70, 20),
    "yellow": (240, 220, 10),
}
SHAPES = ("circle", "rectangle", "triangle")
GLYPHS: dict[str, tuple[int, ...]] = {
    "A": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "C": (0b01110, 0b10001, 0b10000, 0b10000, 0b10000, 0b10001, 0b01110),
    "E": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111),
    "H": (0b10001, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "I": (0b01110, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110),
    "L": (0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b11111),
    "N": (0b10001, 0b11001, 0b10101, 0b10101, 0b10101, 0b10011, 0b10001),
    "O": (0b01110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "T": (0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100),
    "U": (0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "X": (0b10001, 0b01010, 0b01010, 0b00100, 0b01010, 0b01010, 0b10001),
    "Z": (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b10000, 0b11111),
}
"""Letter -> its rows of five dots, top first."""


def paper(rng: Generator, size: int) -> Grey:
    """A light background with a little noise: (size, size, 3) in 0..255."""
    return rng.uniform(205, 250) + rng.normal(0, 3, (size, size, 1)) + np.zeros(3)


def shape(rng: Generator, size: int, form: str, color: str) -> Pixels:
    """One of `SHAPES`, filled, at a random place and of a random size."""
    picture = paper(rng, size)
    width, height = rng.uniform(0.3, 0.6, 2) * size
    if form == "circle":
        height = width
    x0, y0 = rng.uniform(0, size - width), rng.uniform(0, size - height)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    u, v = (x - x0) / width, (y - y0) / height
    if form == "circle":
        inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    elif form == "rectangle":
        inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    else:
        inside = (v >= 0) & (v <= 1) & (np.abs(u - 0.5) <= v / 2)
    return _done(_fill(picture, inside, color))


def bars(rng: Generator, size: int, colors: Sequence[str], heights: Sequence[int], levels: int) -> Pixels:
    """Up to four bars from left to right over a grey line; a height is a whole number of 1..levels."""
    picture = paper(rng, size)
    slot = size // 4
    first = int(rng.integers(0, 4 - len(colors) + 1))
    for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
        left = (first + i) * slot + int(rng.integers(0, 2))
        top = size - 2 - round(height / levels * (size - 4))
        picture[top : size - 2, left : left + slot - 2] = COLORS[color]
    picture[size - 2 :] = 120.0
    return _done(picture)


def letters(rng: Generator, size: int, word: str) -> Pixels:
    """Dark letters of `GLYPHS` from left to right, at a random place."""
    picture = paper(rng, size)
    high, wide = size * 11 // 32, size * 8 // 32
    step = size * 10 // 32
    left = int(rng.integers(0, size - (len(word) - 1) * step - wide + 1))
    top = int(rng.integers(0, size - high + 1))
    ink = rng.uniform(0, 70)
    for i, letter in enumerate(word):
        dots = np.array([[row >> b & 1 for b in (4, 3, 2, 1, 0)] for row in GLYPHS[letter]], dtype=float)
        _blend(picture, enlarge(dots, high, wide), top, left + i * step, ink)
    return _done(picture)


def handwriting(rng: Generator, size: int, strokes: Grey) -> Pixels:
    """A handwritten digit, (h, w) in 0..1, dark on light, enlarged and put at a random place."""
    picture = paper(rng, size)
    side = int(rng.integers(size * 9 // 16, size * 7 // 8 + 1))
    top, left = rng.integers(0, size - side + 1, 2)
    _blend(picture, enlarge(strokes, side, side), int(top), int(left), rng.uniform(0, 70))
    return _done(picture)


def enlarge(grey: Grey, height: int, width: int) -> Grey:
    """(h, w) to (height, width) by linear interpolation between the centres of cells."""
    for axis, length in ((0, height), (1, width)):
        old = grey.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape((-1, 1) if axis == 0 else (1, -1))
        high = np.minimum(low + 1, old - 1)
        grey = np.take(grey, low, axis) * (1 - share) + np.take(grey, high, axis) * share
    return grey


def shrink(picture: Pixels, size: int) -> Pixels:
    """(H, W, 3) to (size, size, 3): each new cell is the mean of what it covers, to whole cells of the old."""
    height, width = picture.shape[:2]
    rows = np.linspace(0, height, size + 1).astype(int)
    columns = np.linspace(0, width, size + 1).astype(int)
    summed = np.add.reduceat(np.add.reduceat(picture.astype(float), rows[:-1], 0), columns[:-1], 1)
    return _done(summed / (np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None]))


def _fill(picture: Grey, inside: NDArray[np.bool_], color: str) -> Grey:
    picture[inside] = COLORS[color]
    return picture


def _blend(picture: Grey, ink: Grey, top: int, left: int, dark: float) -> None:
    place = picture[top : top + ink.shape[0], left : left + ink.shape[1]]
    place += ink[..., None] * (dark - place)


def _done(picture: Grey) -> Pixels:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
