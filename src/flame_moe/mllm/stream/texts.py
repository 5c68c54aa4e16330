"""Tasks of text alone, for a language model that was trained elsewhere: the scenes of the generated tasks in words.

What a scene shows can be read off it, so each task has something that must be learned: code words for colours, the
parity of a digit, the order of bars, letters from the end, and sums. The foundation are general questions with what the
untouched model itself answers: what is kept of it is the share of questions that are still answered in the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flame_moe.files import write_text
from flame_moe.mllm.stream.encode import Encoded, encode_ids
from flame_moe.mllm.stream.generated import COLORS, generate
from flame_moe.mllm.stream.samples import Item, Samples
from flame_moe.mllm.stream.words import Reader

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


def general_questions(count: int, split: str) -> list[Item]:
    """Questions that have nothing to do with the tasks, of val or test; without answers."""
    half = 0 if split == "val" else 1
    asked = [f"What is the capital of {place}?" for place in PLACES[half::2]]
    asked += [f"What color is {thing}?" for thing in THINGS[half::2]]
    asked += [f"What does the word {word} mean?" for word in NOUNS[half::2]]
    asked += [f"Name one animal that lives in {place}." for place in PLACES[half::2]]
    asked += [f"Write a short sentence about {thing}." for thing in (*THINGS, *NOUNS)[half::2]]
    return [Item("general", question, "") for question in asked[:count]]


def own_answers(
    model: Any, reader: Reader, items: Sequence[Item], length: int = 8, kept: Path | None = None
) -> Encoded:
    """Questions with what the model itself says to them: the first tokens of greedy generation.

    Args:
        model: the untouched language model.
        reader: of it.
        items: n questions.
        length: of an answer, in tokens; it ends earlier where the model ends it.
        kept: file of the answers, read where it answers these prompts, else written: generation takes most of a minute.
    """
    prompts = [reader.prompt(item, 0) for item in items]
    asked = {"prompts": prompts, "length": length}
    if kept is not None and kept.is_file() and (held := _answers(kept, asked)) is not None:
        return encode_ids(items, prompts, held, reader)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        answers.append(said[0, len(prompt) :].tolist())
    if kept is not None:
        write_text(kept, json.dumps({**asked, "answers": answers}) + "\n")
    return encode_ids(items, prompts, answers, reader)


def _answers(file: Path, asked: dict[str, Any]) -> list[list[int]] | None:
    """The answers that a file keeps; None if it keeps those of other questions, or is damaged: they are made again."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    same = isinstance(held, dict) and all(held.get(key) == value for key, value in asked.items())
    return held.get("answers") if same else None


PLACES = (
    *("France", "Italy", "Spain", "Japan", "Germany", "Egypt", "Greece", "Russia", "China", "Portugal", "Norway"),
    *("Brazil", "Canada", "India", "Kenya", "Peru"),
)
THINGS = ("the sky", "grass", "snow", "blood", "a banana", "coal", "the sea", "a lemon", "milk", "a carrot")
NOUNS = ("river", "winter", "bridge", "teacher", "garden", "music", "bread", "mountain", "clock", "friend")
