"""Texts as fixed vectors without a model: signed hashing of words, pairs of words and runs of 3 to 5 characters.

Nothing is fitted, so new records get the same numbers on every machine (feature hashing: Weinberger et al. 2009).
All n-grams of many texts are hashed at once, as polynomials modulo 2^64 over code points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

RUNS = (3, 4, 5)
PIECE = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BLANKS = {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x3000}
_PLACE_BITS = 20
_KEPT_BITS = 64 - _PLACE_BITS


def ngram_vectors(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """(n, width) vectors of length 1 of words, pairs of words and runs of characters in one bag.

    A text is lower-cased; a word is a run of letters and digits, and every character above ASCII that is neither a
    blank nor general punctuation counts as a letter. Runs of characters reach over the blanks between words. A feature
    that occurs c times weighs 1 + log c. Each goes to one of `width` places, with a sign, both from its hash.

    Args:
        texts: none of them blank.
        width: of the vectors.
    """
    found = np.empty((len(texts), width), dtype=np.float32)
    at = 0
    for piece in _pieces([text.lower() for text in texts]):
        found[at : at + len(piece)] = _vectors(piece, width)
        at += len(piece)
    return found


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, about a million characters at a time, so that memory does not grow with their number."""
    piece: list[str] = []
    size = 0
    for text in texts:
        piece.append(text)
        size += len(text)
        if size >= PIECE or len(piece) == 1 << _PLACE_BITS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _vectors(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    points, owner = _code_points(texts)
    hashes, text = (np.concatenate(pair) for pair in zip(_words(points, owner), _runs(points, owner), strict=True))
    bag = _bag(hashes, text, len(texts), width)
    norm = np.sqrt((bag**2).sum(axis=1, keepdims=True))
    return (bag / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def _code_points(texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Code points of all texts end to end, blanks drawn together and one at either end, and the text of each."""
    raw = np.frombuffer(" ".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
    lengths = np.array([len(text) + 1 for text in texts])
    lengths[-1] -= 1
    owner = np.repeat(np.arange(len(texts)), lengths)
    raw = np.where(np.isin(raw, list(_BLANKS)), 0x20, raw)
    # The blank that joins two texts ends the first; every text also gets one in front.
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    raw, owner = np.insert(raw, starts, 0x20), np.insert(owner, starts, np.arange(len(texts)))
    raw, owner = np.append(raw, 0x20), np.append(owner, len(texts) - 1)
    blank = raw == 0x20
    again = np.zeros(len(raw), dtype=bool)
    again[1:] = blank[1:] & blank[:-1] & (owner[1:] == owner[:-1])
    return raw[~again], owner[~again]


def _words(points: Ints, owner: Ints) -> tuple[Hashes, Ints]:
    """Hashes of words and of neighbouring words, and the text of each."""
    ascii_word = ((points >= 0x30) & (points <= 0x39)) | ((points >= 0x61) & (points <= 0x7A))
    beyond = (points > 0xBF) & ~((points >= 0x2000) & (points <= 0x206F)) & (points != 0x3000)
    inside = np.concatenate([[False], ascii_word | beyond, [False]])
    start = np.flatnonzero(inside[1:-1] & ~inside[:-2])
    end = np.flatnonzero(inside[1:-1] & ~inside[2:]) + 1
    if len(start) == 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    # All words take in their next letter at once; the longest stand first, so that those that go on are a prefix.
    word, text = np.zeros(len(start), dtype=np.uint64), owner[start]
    longest = int((end - start).max())
    order = np.argsort(start - end, kind="stable")
    sizes = (end - start)[order]
    for i in range(longest):
        still = order[: np.searchsorted(-sizes, -i, side="left")]
        word[still] = word[still] * _BASE + points[start[still] + i].astype(np.uint64) + np.uint64(1)
    single = _mix(word ^ np.uint64(1))
    pair = text[1:] == text[:-1]
    double = _mix(single[:-1][pair] * _BASE + single[1:][pair])
    return np.concatenate([single, double]), np.concatenate([text, text[1:][pair]])


def _runs(points: Ints, owner: Ints) -> tuple[Hashes, Ints]:
    """Hashes of all runs of 3, 4 and 5 characters that lie within one text, and the text of each."""
    letters = points.astype(np.uint64) + np.uint64(1)
    hashes, texts = [], []
    running = letters.copy()
    for size in range(2, max(RUNS) + 1):
        if len(letters) < size:
            break
        running = running[:-1] * _BASE + letters[size - 1 :]
        if size in RUNS:
            same = owner[: len(running)] == owner[size - 1 :]
            hashes.append(_mix(running[same] ^ np.uint64(size << 56)))
            texts.append(owner[: len(running)][same])
    return np.concatenate(hashes), np.concatenate(texts)


def _mix(h: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of h."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _bag(hashes: Hashes, text: Ints, n: int, width: int) -> NDArray[np.float64]:
    """(n, width) signed sums of 1 + log count."""
    keys = (text.astype(np.uint64) << np.uint64(_KEPT_BITS)) | (hashes >> np.uint64(_PLACE_BITS))
    keys, counts = np.unique(keys, return_counts=True)
    owner = (keys >> np.uint64(_KEPT_BITS)).astype(np.int64)
    kept = keys & np.uint64((1 << _KEPT_BITS) - 1)
    place = (((kept >> np.uint64(12)) * np.uint64(width)) >> np.uint64(32)).astype(np.int64)
    weight = (1.0 + np.log(counts)) * np.where(kept & np.uint64(1), 1.0, -1.0)
    total: NDArray[np.float64] = np.bincount(owner * width + place, weight, n * width).astype(np.float64)
    return total.reshape(n, width)
