"""A folder with dates and times, volumes as arrays, records with gaps and volumes of any orientation."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources.folder import SOURCE, FolderOptions, write_draft
from flame_moe.errors import FlameError
from tests.test_sources_folder import folder, read

SAMPLES = "id,admitted\na,2130-05-01 08:00\nb,2130-05-02T00:00:00\nc,\n"
DATED = """
window = 48
[samples]
file = "samples.csv"
origin = "admitted"
[modalities.vitals]
kind = "series"
file = "vitals.csv"
time = "at"
unit = "datetime"
columns = ["hr"]
"""


def dated(root: Path, vitals: str, samples: str = SAMPLES, description: str = DATED) -> Path:
    return folder(root, description, samples_dot_csv=samples, vitals_dot_csv=f"id,at,hr\n{vitals}")


def hours(raw: Path, id: str = "a") -> list[float]:
    times = read(raw)[id].modalities["vitals"].times
    assert times is not None
    return (times.astype(float) * 48).round(4).tolist()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2130-05-01 08:00:00", 0.0),
        ("2130-05-01T20:30:00", 12.5),
        ("2130-05-02", 16.0),
        ("2130-05-01 09:15", 1.25),
        ("2130-05-01 08:00:18.5", 0.0051),
        ("2130-05-01T08:00:18,500", 0.0051),
        ("  2130-05-03 08:00:00  ", 48.0),
    ],
)
def test_dates_and_times_become_hours_since_the_origin(tmp_path: Path, written: str, expected: float) -> None:
    quoted = f'"{written}"'
    assert hours(dated(tmp_path, f"a,{quoted},80\n")) == [expected]


def test_each_sample_counts_from_its_own_origin_and_rows_are_sorted(tmp_path: Path) -> None:
    raw = dated(tmp_path, "b,2130-05-02 06:00,1\na,2130-05-02 08:00,2\na,2130-05-01 09:00,3\n")
    assert hours(raw) == [1.0, 24.0]
    assert read(raw)["a"].modalities["vitals"].values.ravel().tolist() == [3, 2]
    assert hours(raw, "b") == [6.0]


def test_time_zones_are_compared_in_utc(tmp_path: Path) -> None:
    samples = "id,admitted\na,2130-03-31T01:30:00+01:00\n"
    # The clock is put forward by an hour in between: half past one to half past three is one hour.
    assert hours(dated(tmp_path / "z", "a,2130-03-31T03:30:00+02:00,80\na,2130-03-31T02:30Z,81\n", samples)) == [
        1.0,
        2.0,
    ]
    assert hours(dated(tmp_path / "w", "a,2130-03-30T20:31-0500,80\n", samples)) == [pytest.approx(1.0167)]


def test_parquet_holds_times_as_such(tmp_path: Path) -> None:
    raw = dated(tmp_path, "", description=DATED.replace(".csv", ".parquet"))
    table = pl.read_csv(SAMPLES.encode()).with_columns(pl.Series("admitted", ["2130-05-01T08:00", "2130-05-02", None]))
    moment = pl.col("admitted").str.to_datetime("%Y-%m-%dT%H:%M", strict=False)
    table.with_columns(moment).write_parquet(raw / "samples.parquet")
    at = pl.Series("at", ["2130-05-01 10:00", "2130-05-01 09:00"]).str.to_datetime("%Y-%m-%d %H:%M")
    rows = pl.DataFrame({"id": ["a", "a"], "at": at, "hr": [1.0, 2.0]})
    rows.write_parquet(raw / "vitals.parquet")
    assert hours(raw) == [1.0, 2.0]
    rows.with_columns(pl.col("at").dt.date()).with_columns(pl.col("at").dt.offset_by("1d")).write_parquet(
        raw / "vitals.parquet"
    )
    shutil.rmtree(raw / ".steps")
    assert hours(raw) == [16.0, 16.0]
    rows.with_columns(pl.col("at").dt.replace_time_zone("Europe/Berlin")).write_parquet(raw / "vitals.parquet")
    shutil.rmtree(raw / ".steps")
    with pytest.raises(FlameError, match="times in column 'at' have a time zone, those in column 'admitted' have none"):
        read(raw)


@pytest.mark.parametrize(
    ("vitals", "samples", "message"),
    [
        ("a,2130-02-30 08:00,80\n", SAMPLES, r"'2130-02-30 08:00' in column 'at' is no time .*vitals.csv"),
        ("a,01/05/2130,80\n", SAMPLES, "'01/05/2130' in column 'at' is no time"),
        ("a,2130-05-01 25:00,80\n", SAMPLES, "'2130-05-01 25:00' in column 'at' is no time"),
        ("a,12,80\n", SAMPLES, "'12' in column 'at' is no time"),
        ("a,2130-05-01,80\n", SAMPLES.replace("08:00", "noon"), r"in column 'admitted' is no time .*samples.csv"),
        ("c,2130-05-01,80\n", SAMPLES, "sample 'c' has no time in column 'admitted'"),
        ("a,2130-05-01 07:59:59,80\n", SAMPLES, r"1 of 1 times are not in 0 to 48 h.*'a', is -0.000277"),
        ("a,2130-05-03 08:00:01,80\n", SAMPLES, r"'a', is 48.0003 h"),
        ("a,,80\n", SAMPLES, "the first, of 'a', is missing"),
        ("a,2130-05-01 09:00Z,80\n", SAMPLES, "times in column 'at' have a time zone, those in column 'admitted'"),
        ("a,2130-05-01 09:00Z,80\na,2130-05-01,1\n", SAMPLES, "some times in column 'at' have a time zone and others"),
        ("a,2130-05-01,80\n", "id,came\na,2130-05-01\n", "the column 'admitted' is missing"),
    ],
)
def test_a_time_that_cannot_be_is_one_sentence(tmp_path: Path, vitals: str, samples: str, message: str) -> None:
    with pytest.raises(FlameError, match=message) as caught:
        read(dated(tmp_path, vitals, samples))
    assert "\n" not in str(caught.value)


def test_dates_need_an_origin(tmp_path: Path) -> None:
    raw = dated(tmp_path, "", description=DATED.replace('origin = "admitted"\n', ""))
    with pytest.raises(FlameError, match=r"dates and times need an origin .*modalities.vitals: unit"):
        read(raw)


def test_times_outside_the_window_are_dropped_and_counted_on_request(tmp_path: Path) -> None:
    raw = dated(tmp_path, "a,2130-04-30,1\na,,2\na,2130-05-01 08:00,3\n", description=DATED + 'outside = "drop"\n')
    funnel = Funnel()
    assert read(raw, funnel)["a"].modalities["vitals"].values.ravel().tolist() == [3]
    assert funnel.counts == {"vitals: row with a time that is missing or not in 0 to 48 h, left out": 2}


def arrays(root: Path, kind: str, more: str = "", **named: Any) -> Path:
    description = f"""{DATED.split("[modalities")[0]}
    [modalities.x]
    kind = "{kind}"
    file = "x.npz"
    {more}
    """
    raw = folder(root, description, samples_dot_csv=SAMPLES)
    np.savez(raw / "x.npz", **named)
    return raw


def test_times_of_arrays_may_be_dates(tmp_path: Path) -> None:
    when = np.array(["2130-05-01T20", "2130-05-02T08"], dtype="datetime64[s]")
    unit = 'unit = "datetime"'
    raw = arrays(tmp_path / "a", "timed", unit, **{"a": np.eye(2), "a.times": when})
    times = read(raw)["a"].modalities["x"].times
    assert times is not None
    assert times.tolist() == [0.25, 0.5]
    with pytest.raises(FlameError, match=r"the times are datetime64\[s\], no numbers.*unit = 'datetime'"):
        read(arrays(tmp_path / "b", "timed", **{"a": np.eye(2), "a.times": when}))
    with pytest.raises(FlameError, match="the times are float64, not datetime64"):
        read(arrays(tmp_path / "c", "timed", unit, **{"a": np.eye(2), "a.times": np.zeros(2)}))
    with pytest.raises(FlameError, match="sample 'c' has no time in column 'admitted'"):
        read(arrays(tmp_path / "d", "timed", unit, **{"c": np.eye(2), "c.times": when}))


SIZE = "size = [8, 8, 8]\nblock = [4, 4, 8]"


def head(seed: int = 0) -> np.ndarray:
    """A bright ball off the centre."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in (10, 12, 8)), indexing="ij")
    ball = (axes[0] - 0.2) ** 2 + (axes[1] + 0.1) ** 2 + axes[2] ** 2 < 0.5
    noise = np.random.default_rng(seed).random(ball.shape)
    return np.where(ball, 100 + 20 * noise, noise).astype(np.float32)


def test_a_volume_is_the_same_as_an_array_and_as_a_file_of_any_orientation(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    more = SIZE + "\nspacing = [2.0, 1.5, 2.5]"
    expected = read(arrays(tmp_path / "npz", "volume", more, a=head()))["a"].modalities["x"].values
    assert expected.shape == (4, 128)
    straight = nibabel.Nifti1Image(head(), np.diag([2.0, 1.5, 2.5, 1.0]))
    ras = nibabel.orientations.io_orientation(straight.affine)
    for codes in ("RAS", "LPI", "PIL", "SAR"):
        raw = arrays(tmp_path / codes, "volume", SIZE)
        text = (raw / "flame.toml").read_text().replace('file = "x.npz"', 'folder = "scans"')
        (raw / "flame.toml").write_text(text)
        (raw / "scans").mkdir()
        turn = nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(tuple(codes)))
        nibabel.save(straight.as_reoriented(turn), raw / "scans" / "a.nii.gz")
        assert read(raw)["a"].modalities["x"].values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4)), r"the array is float64 \(4, 4\), no volume"),
        (np.zeros((4, 4, 0)), "no volume"),
        (np.array([[["a"]]]), "no volume"),
        (np.ones((4, 4, 4)), r"nothing in the volume stands out.*x.npz: 'a'"),
        (np.full((4, 4, 4), np.inf), "no finite voxel"),
    ],
)
def test_an_array_that_is_no_volume_is_one_sentence(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(FlameError, match=message):
        read(arrays(tmp_path, "volume", SIZE, a=array))


def record(raw: Path, signal: np.ndarray) -> None:
    wfdb = pytest.importorskip("wfdb")
    (raw / "ecg").mkdir(exist_ok=True)
    lead = {"fs": 100, "units": ["mV", "mV"], "sig_name": ["I", "II"], "fmt": ["16", "16"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wfdb.wrsamp("a", p_signal=signal, write_dir=str(raw / "ecg"), **lead)


def test_runs_of_missing_samples_of_a_record_are_bridged_and_counted(tmp_path: Path) -> None:
    raw = folder(
        tmp_path,
        DATED.split("[modalities")[0]
        + '[modalities.ecg]\nkind = "waveform"\nfolder = "ecg"\nleads = ["II", "I"]\nrate = 100\nseconds = 3\n',
        samples_dot_csv=SAMPLES,
    )
    t = np.arange(300) / 100
    signal = np.stack([np.sin(7 * t), t], axis=1)
    signal[:20, 0] = signal[100:180, 0] = signal[290:, 1] = np.nan
    record(raw, signal)
    funnel = Funnel()
    values = read(raw, funnel)["a"].modalities["ecg"].values
    first, second = values[:, 1], values[:, 0]
    assert first[:20] == pytest.approx(np.full(20, np.sin(7 * 0.2)), abs=1e-3)
    line = np.interp(t[100:180], [t[99], t[180]], np.sin([7 * t[99], 7 * t[180]]))
    assert first[100:180] == pytest.approx(line, abs=1e-3)
    assert first[180:] == pytest.approx(np.sin(7 * t[180:]), abs=1e-3)
    assert second[290:] == pytest.approx(np.full(10, 2.89), abs=1e-3)
    assert funnel.counts == {"ecg: missing sample of a waveform, filled from its neighbours": 110}
    samples = raw / "ecg" / "a.dat"
    stored = np.frombuffer(samples.read_bytes(), dtype="<i2").reshape(300, 2).copy()
    stored[:, 1] = -32768  # how format 16 writes a sample that is missing
    samples.write_bytes(stored.tobytes())
    with pytest.raises(FlameError, match="lead 'II' has no sample"):
        read(raw)


def test_a_draft_counts_dates_from_where_samples_begin(tmp_path: Path) -> None:
    samples = "".join(
        f"s{i},1950-01-01,2130-05-0{1 + i % 9} 08:00:00,2130-06-01,{'2130-06-01' if i % 2 else ''},{i % 3 == 0:d}\n"
        for i in range(30)
    )
    labs = "".join(
        f"s{i},{id},2130-05-0{1 + i % 9} {10 + h}:30:00,2130-05-30,{h}.5\n"
        for i in range(30)
        for h, id in enumerate(("Na", "K"))
    )
    drugs = "".join(f"s{i},2130-05-0{1 + i % 9}T20:00,aspirin\n" for i in range(30))
    (tmp_path / "stays.csv").write_text("stay_id,birth,admittime,dischtime,deathtime,died\n" + samples)
    (tmp_path / "labs.csv").write_text("stay_id,test,charttime,storetime,result\n" + labs)
    (tmp_path / "clinics.csv").write_text("subject_id,place_id,beds\n70,1,2\n71,1,3\n")
    (tmp_path / "drugs.csv").write_text("stay_id,given,drug\n" + drugs)
    text = write_draft(tmp_path).read_text()
    assert 'origin = "admittime"' in text
    assert text.count('unit = "datetime"') == 2
    assert "window = 12\n" in text
    assert "# clinics.csv: no column with the ids of the samples was recognised." in text
    modalities, tasks = SOURCE.describe(tmp_path, FolderOptions())
    assert {m.name: m.kind for m in modalities} == {"labs": "series", "drugs": "codes"}
    assert [task.name for task in tasks] == ["died"]
    store = prepare("folder", tmp_path, tmp_path / "store")
    times = store.sample(0).modalities["labs"].times
    assert times is not None
    assert (times * 12).tolist() == pytest.approx([2.5, 3.5])


def test_a_draft_says_what_dates_lack(tmp_path: Path) -> None:
    (tmp_path / "stays.csv").write_text("stay_id,died\n" + "".join(f"s{i},{i % 2}\n" for i in range(9)))
    (tmp_path / "labs.csv").write_text("stay_id,charttime,result\ns1,2130-05-01,2\ns1,2130-05-02,3\n")
    text = write_draft(tmp_path).read_text()
    assert "# charttime has dates, but no column of the samples says from when to count (origin)" in text
    assert "# origin = " in text
