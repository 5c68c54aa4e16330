"""Codes, images and splits that a source fixes: what the store keeps of them and what preprocessing makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.codes import code_id
from flame_moe.data.funnel import Funnel
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.sources import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import DataError, RecipeError
from flame_moe.schema import Modality, Task

EVENTS = Modality(name="events", kind="codes", features=2, types=("diagnosis", "drug"), vocabulary=2)
PICTURE = Modality(name="picture", kind="image", features=6, shape=(2, 3, 1))
ILL = Task(name="ill", kind="binary", modalities=("events", "picture"), classes=("no", "yes"))


def event(kind: int, *codes: str) -> Observation:
    values = np.array([[kind, code_id(code)] for code in codes], dtype=np.int32)
    return Observation(values, np.zeros(len(codes), dtype=np.float32))


def picture(*pixels: int) -> Observation:
    return Observation(np.array([pixels], dtype=np.uint8), np.zeros(1, dtype=np.float32))


def write(folder: Path, parts: Sequence[dict[str, Observation]], splits: Sequence[str | None], **options: Any) -> Store:
    with StoreWriter(folder, source="mine", options={}, modalities=[EVENTS, PICTURE], tasks=[ILL]) as writer:
        for i, (part, split) in enumerate(zip(parts, splits, strict=True)):
            label = {"ill": np.array([i % 2], dtype=np.float32)}
            writer.add(Sample(f"s{i}", f"p{i // 2}", part, label, split))
        return writer.finish(SplitSpec(), Funnel(), **options)


def whole(folder: Path) -> Store:
    parts = [
        {"events": event(0, "a", "b"), "picture": picture(0, 0, 0, 255, 255, 255)},
        {"events": event(1, "a")},
        {"events": event(1, "c", "c", "a")},
        {"picture": picture(9, 8, 7, 6, 5, 4)},
        {"events": event(0, "d")},
        {"events": event(0, "d", "b")},
    ]
    return write(folder, parts, ["train"] * 2 + ["val"] * 2 + ["test"] * 2)


def test_codes_and_pixels_come_back_as_they_were_written(tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    got = store.sample(0)
    assert got.modalities["events"].values.tolist() == [[0, code_id("a")], [0, code_id("b")]]
    assert got.modalities["picture"].values.tolist() == [[0, 0, 0, 255, 255, 255]]
    assert got.modalities["picture"].values.dtype == np.uint8


def test_the_most_frequent_training_codes_get_a_row_and_the_rest_share_one(tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    fitted = Preprocessor.from_store(store)
    part = store.gather("events", np.arange(6))
    known = {code: i + 1 for i, code in enumerate(sorted([code_id("a"), code_id("b")]))}
    a, b = known[code_id("a")], known[code_id("b")]
    expected = [[0, a], [0, b], [1, a], [1, 0], [1, 0], [1, a], [0, 0], [0, 0], [0, b]]
    assert fitted.apply("events", part.values, None).tolist() == expected


def test_pixels_are_scaled_by_the_training_pixels_alone(tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    part = store.gather("picture", [0, 3])
    scaled = Preprocessor.from_store(store).apply("picture", part.values, None)
    assert scaled[0] == pytest.approx([-1.0] * 3 + [1.0] * 3)
    assert scaled[1] == pytest.approx((np.array([9, 8, 7, 6, 5, 4]) - 127.5) / 127.5, abs=1e-5)


def test_a_split_that_the_source_fixes_is_kept(tmp_path: Path) -> None:
    assert whole(tmp_path / "s").splits.tolist() == [0, 0, 1, 1, 2, 2]
    one = {"events": event(0, "a")}
    with pytest.raises(DataError, match=r"subject 'p0' is in split test here and in another before \[sample 's1'\]"):
        write(tmp_path / "a", [one, one], ["train", "test"])
    with pytest.raises(DataError, match=r"a subject has no split, others have \[subject 'p1'\]"):
        write(tmp_path / "b", [one] * 4, ["train", "train", None, None])
    with pytest.raises(DataError, match=r"unknown split 'dev'"):
        write(tmp_path / "c", [one], ["dev"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"events": Observation(np.array([[0.0, 3.5]]), np.zeros(1))}, "codes of type float64 are no whole numbers"),
        ({"events": Observation(np.array([[2, 3]]), np.zeros(1))}, r"event type 2, but there are 2.*diagnosis, drug"),
        ({"events": Observation(np.array([[0, -3]]), np.zeros(1))}, "the value -3 is not in 0 to 2147483647"),
        ({"picture": Observation(np.full((1, 6), 256), np.zeros(1))}, "the value 256 is not in 0 to 255"),
        ({"picture": Observation(np.zeros((1, 5), np.uint8), np.zeros(1))}, r"values have shape \(1, 5\)"),
        ({"picture": Observation(np.zeros((1, 6), np.uint8))}, "needs times"),
    ],
)
def test_what_are_no_codes_or_pixels_is_refused(tmp_path: Path, part: dict[str, Observation], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "s", [part], [None])


def test_descriptions_of_codes_and_images_must_be_complete() -> None:
    with pytest.raises(RecipeError, match="it needs features = 2 and the names of its types"):
        Modality.parse({"name": "m", "kind": "codes", "features": 2}, where="m")
    with pytest.raises(RecipeError, match=r"not 6 with shape \(2, 2, 1\)"):
        Modality.parse({"name": "m", "kind": "image", "features": 6, "shape": [2, 2, 1]}, where="m")
