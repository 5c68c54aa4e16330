"""Small sets of pictures: official splits without twins, groups and patients kept whole, quadrants of digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources import get_source
from flame_moe.data.sources._arrays import smaller, twins
from flame_moe.data.work import Work
from flame_moe.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
ROWS = (
    "patientid,offset,sex,age,went_icu,in_icu,temperature,pO2_saturation,neutrophil_count,lymphocyte_count,survival\n"
)


def read(name: str, raw: Path, **options: Any) -> tuple[dict[str, Sample], Funnel]:
    source, funnel = get_source(name), Funnel()
    samples = source.read(raw, source.options(**options), funnel, Work(raw.with_name("steps")))
    return {sample.id: sample for sample in samples}, funnel


def xrays(path: Path, **changes: NDArray[Any]) -> Path:
    """A MedMNIST file: 10 pictures in each split; train 3 is also test 5, train 4 val 0, val 7 test 1."""
    test, val, train = NOISE[:10].copy(), NOISE[10:20].copy(), NOISE[20:30].copy()
    train[3], train[4], val[7] = test[5], val[0] // 2 + 20, test[1]
    arrays: dict[str, NDArray[Any]] = {"train_images": train, "val_images": val, "test_images": test}
    arrays |= {f"{split}_labels": np.arange(10)[:, None] % 2 for split in ("train", "val", "test")}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value.size})
    return path


def test_twins_are_told_whatever_their_brightness() -> None:
    brighter = (NOISE[:3] // 2 + 60).astype(np.uint8)
    assert twins(brighter, NOISE[2:], 0.98).tolist() == [False, False, True]
    assert twins(NOISE[:2], NOISE[:0], 0.98).tolist() == [False, False]
    assert twins(np.zeros((1, 8, 8), np.uint8), NOISE, 0.98).tolist() == [False]


def test_a_picture_is_made_smaller_by_means_of_squares() -> None:
    picture = np.array([[0, 10, 1, 1], [20, 30, 1, 1]], dtype=np.uint8)
    assert smaller(picture, 2).ravel().tolist() == [15, 1]
    assert smaller(picture, 1) is picture


def test_official_splits_are_kept_and_twins_leave_the_earlier_one(tmp_path: Path) -> None:
    samples, funnel = read("chest_xray", xrays(tmp_path / "x.npz"))
    assert [step.dropped for step in funnel.steps] == [0, 2, 1]
    assert {"train00003", "train00004", "val00007"}.isdisjoint(samples)
    assert {"test00005", "val00000", "test00001"} <= set(samples)
    assert all(sample.id.startswith(str(sample.split)) for sample in samples.values())
    assert samples["train00002"].modalities["picture"].values[0].tolist() == NOISE[22].ravel().tolist()
    assert len(read("chest_xray", tmp_path / "x.npz", twin=1.0)[0]) == 30


def test_pictures_without_labels_can_be_scored(tmp_path: Path) -> None:
    nothing = {f"{split}_{what}": NOISE[:0] for split in ("train", "val") for what in ("images", "labels")}
    path = xrays(tmp_path / "x.npz", test_labels=NOISE[:0], **nothing)
    store = prepare("chest_xray", path, tmp_path / "s", require_labels=False)
    assert len(store) == 10
    np.savez(tmp_path / "b.npz", images=NOISE, groups=np.arange(60))
    assert len(prepare("breast_ultrasound", tmp_path / "b.npz", tmp_path / "t", require_labels=False)) == 60


def test_the_open_chest_x_rays_have_ten_training_pictures_in_a_later_split(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "pneumoniamnist"
    store = prepare("chest_xray", folder, tmp_path / "s")
    with np.load(folder / "pneumoniamnist_thinned.npz") as arrays:
        later = {picture.tobytes() for split in ("val", "test") for picture in arrays[f"{split}_images"]}
        repeated = sum(picture.tobytes() in later for picture in arrays["train_images"])
    assert repeated == 10
    assert np.bincount(store.splits).tolist() == [3101, 420, 500]
    positives = [
        sum(store.sample(int(i)).targets["pneumonia"][0] for i in store.indices(split=s)) for s in ("val", "test")
    ]
    assert positives == [312, 313]


def test_near_duplicates_of_ultrasound_are_in_one_split(shared_data: Path, tmp_path: Path) -> None:
    store = prepare("breast_ultrasound", shared_data / "busi", tmp_path / "s")
    splits: dict[str, set[int]] = {}
    labels = []
    for i in range(len(store)):
        sample = store.sample(i)
        splits.setdefault(sample.subject, set()).add(int(store.splits[i]))
        labels.append(int(sample.targets["finding"][0]))
        assert ("malignant" in sample.targets) == (labels[-1] > 0)
    assert np.bincount(labels).tolist() == [106, 350, 168]
    assert len(splits) == 495
    assert all(len(found) == 1 for found in splits.values())
    assert store.modalities["picture"].shape == (64, 64, 1)
    _, funnel = read("breast_ultrasound", shared_data / "busi")
    assert funnel.counts["groups of near-duplicates with different labels"] == 6


def test_four_quadrants_make_the_digit(shared_data: Path) -> None:
    samples, funnel = read("mnist", shared_data / "mnist", samples=100, test=20)
    assert len(samples) == 120
    assert funnel.steps[0].after == 68_000
    assert sum(sample.split == "val" for sample in samples.values()) == 10
    first = samples["train00000"]
    parts = {name: part.values.reshape(14, 14) for name, part in first.modalities.items()}
    whole = np.block([[parts["upper_left"], parts["upper_right"]], [parts["lower_left"], parts["lower_right"]]])
    with np.load(shared_data / "mnist" / "mnist.npz") as arrays:
        assert np.array_equal(whole, arrays["x_train"][0])
        label = int(arrays["y_train"][0])
    assert {name: float(v[0]) for name, v in first.targets.items()} == {
        **{"digit": label, "odd": label % 2, "large": label >= 5, "loops": label in (0, 6, 8, 9)}
    }


def covid(folder: Path, rows: str, pictures: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text(ROWS + rows)
    np.savez(folder / "images.npz", images=NOISE[:pictures])
    return folder


def test_a_picture_taken_in_intensive_care_does_not_ask_whether_it_comes_to_that(tmp_path: Path) -> None:
    rows = "p1,3,M,,Y,N,39.5,,,,N\np1,5,M,,Y,Y,,,,,N\np2,,F,44,N,N,,,,,\np3,,,,,,,,,,\n"
    raw = covid(tmp_path / "c", rows)
    samples, funnel = read("covid_cxr", raw)
    assert [s.subject for s in samples.values()] == ["p1", "p1", "p2", "p3"]
    assert [s.targets["went_icu"].tolist() if s.targets else None for s in samples.values()] == [[1], None, [0], None]
    assert funnel.counts == {
        "picture taken in intensive care, no label": 1,
        "went_icu not recorded, no label": 1,
    }
    assert [*samples["picture000"].modalities["clinical"].values[0]] == [3, 0, 39.5, 0, 0, 0, 1]
    assert "clinical" not in samples["picture003"].modalities
    kept, _ = read("covid_cxr", raw, in_icu="keep")
    assert kept["picture001"].targets["went_icu"].tolist() == [1]
    after, _ = read("covid_cxr", covid(tmp_path / "d", rows.replace("Y,N,39.5", "N,N,39.5").replace(",N\n", ",Y\n")))
    for name, sample in samples.items():
        for modality, part in sample.modalities.items():
            assert np.array_equal(part.values, after[name].modalities[modality].values)


def test_the_open_covid_pictures_are_split_by_patient(shared_data: Path, tmp_path: Path) -> None:
    store = prepare("covid_cxr", shared_data / "covid-cxr-ccby", tmp_path / "s")
    assert (len(store), len({store.sample(i).subject for i in range(86)})) == (86, 43)
    labels = [float(t["went_icu"][0]) for i in range(86) if (t := store.sample(i).targets)]
    assert (len(labels), sum(labels)) == (63, 19)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chest_xray", r"there are 0 \.npz files with arrays test_images, not one .*part of MedMNIST"),
        ("breast_ultrasound", r"there are 0 \.npz files with arrays images, groups, not one"),
        ("mnist", r"there are 0 \.npz files with arrays x_train"),
        ("covid_cxr", r"there are 0 \.npz files with arrays images"),
    ],
)
def test_a_folder_without_the_file_is_one_sentence(tmp_path: Path, name: str, message: str) -> None:
    source = get_source(name)
    with pytest.raises(DataError, match=message):
        source.describe(tmp_path, source.options())


def test_files_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"test_images": NOISE[:10].astype(np.float32)}, "pictures are float32 of shape"),
        ({"test_labels": np.arange(3)}, "10 pictures have 3 labels"),
        ({"test_labels": np.full(10, 7)}, "a label is 7, not one of 2 classes"),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            read("chest_xray", xrays(tmp_path / "x.npz", **changes))
    (tmp_path / "broken.npz").write_bytes(b"PK and no more")
    with pytest.raises(DataError, match=r"the file is no \.npz, or damaged \[.*broken"):
        read("mnist", tmp_path / "broken.npz")
    np.savez(tmp_path / "m.npz", x_train=NOISE, y_train=np.zeros(60), x_test=NOISE)
    with pytest.raises(DataError, match=r"the array 'y_test' is missing"):
        read("mnist", tmp_path / "m.npz")
    np.savez(tmp_path / "b.npz", images=NOISE, groups=np.arange(60))
    source = get_source("breast_ultrasound")
    with pytest.raises(DataError, match=r"pictures of shape \(8, 8\) cannot be made smaller by 3"):
        source.describe(tmp_path / "b.npz", source.options(shrink=3))
    with pytest.raises(DataError, match="there are 4 pictures and 1 rows"):
        read("covid_cxr", covid(tmp_path / "c", "p1,3,M,,Y,N,39.5,,,,N\n"))
