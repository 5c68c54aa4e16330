"""Tasks of real data that a user may have: easy-VQA (V. Zhou, MIT) and NLVR (Suhr et al., ACL 2017, CC BY 4.0).

Expected under the folder of raw data, both optional:

    easy-vqa/{train,test}_images.npz       images (n, 64, 64, 3) uint8, ids
    easy-vqa/{train,test}_questions.json.gz   list of [question, answer, image id]
    nlvr/{dev,test}.json.gz, nlvr/{dev,test}_images.tar   as published, one JSON per line; SPLIT-IDENTIFIER-0.png
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flame_moe.errors import DataError
from flame_moe.mllm.stream.pictures import shrink
from flame_moe.mllm.stream.samples import Item, Pixels, Samples

_WHOLE = "Give the folder that holds it whole, or leave it out: the generated tasks need no raw data."


def easy_vqa(folder: Path, split: str, count: int, size: int) -> Samples:
    """Questions about one shape; a fifth of the training pictures is validation, by picture."""
    file = "test" if split == "test" else "train"
    asked = _json(folder / f"{file}_questions.json.gz")[0]
    try:
        with np.load(folder / f"{file}_images.npz") as stored:
            pictures = dict(zip(stored["ids"].tolist(), stored["images"], strict=True))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"the pictures cannot be read: {error}", where=str(folder), mend=_WHOLE) from None
    rows = [(q, a, i) for q, a, i in asked if file == "test" or (i % 5 == 4) == (split == "val")]
    small: dict[int, Pixels] = {}
    items = []
    for row in np.random.default_rng(0).permutation(len(rows))[:count]:
        question, answer, number = rows[row]
        picture = small.setdefault(number, shrink(pictures[number], size))
        kind = "exists" if answer in ("yes", "no") else "color" if "color" in question else "shape"
        items.append(Item(kind, words(question), words(answer), "", picture))
    return Samples.of(items)


def nlvr(folder: Path, split: str, count: int, size: int) -> Samples:
    """Is a sentence that a person wrote true of a picture; the development set is for training, by picture, the rest
    of it for validation."""
    file = "test" if split == "test" else "dev"
    rows = _json(folder / f"{file}.json.gz")
    chosen = [r for r in rows if file == "test" or (int(r["identifier"].split("-")[0]) % 5 == 4) == (split == "val")]
    pictures = dict(_pictures(folder / f"{file}_images.tar", size))
    items = []
    for row in chosen[:count]:
        name = f"{file}-{row['identifier']}-0"
        if name not in pictures:
            raise DataError(f"the picture {name}.png is missing", where=f"{folder}/{file}_images.tar", mend=_WHOLE)
        question = f"is it so : {words(row['sentence'])}"
        items.append(Item("claim", question, "yes" if row["label"] == "true" else "no", "", pictures[name]))
    return Samples.of(items)


RECORDED: dict[str, tuple[str, Callable[[Path, str, int, int], Samples]]] = {
    "easy_vqa": ("easy-vqa", easy_vqa),
    "nlvr": ("nlvr", nlvr),
}
"""Task -> its folder among the raw data, and how it is read."""


def words(text: str) -> str:
    """Lower-case words and numbers, punctuation but for question marks left out, separated by blanks.

    Example:
        >>> words("Is there a red shape?")
        'is there a red shape ?'
    """
    return " ".join(re.findall(r"[a-z]+|[0-9]+|\?", text.lower()))


def _json(path: Path) -> list[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"the questions cannot be read: {error}", where=str(path), mend=_WHOLE) from None


def _pictures(path: Path, size: int) -> Iterator[tuple[str, Pixels]]:
    from PIL import Image

    try:
        with tarfile.open(path) as archive:
            for member in archive:
                held = archive.extractfile(member) if member.name.endswith(".png") else None
                if held is not None:
                    image = Image.open(io.BytesIO(held.read())).convert("RGB")
                    yield Path(member.name).stem, shrink(np.asarray(image), size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"the pictures cannot be read: {error}", where=str(path), mend=_WHOLE) from None
