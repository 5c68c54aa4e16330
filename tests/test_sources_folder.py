"""The promises of a folder described in flame.toml."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from flame_moe.batch import Sample
from flame_moe.cli import app
from flame_moe.data.check import check_sample
from flame_moe.data.codes import code_id
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources.folder import SOURCE, FolderOptions, write_draft
from flame_moe.data.text import TextOptions, embed_texts
from flame_moe.data.work import Work
from flame_moe.errors import DataError, FlameError

SAMPLES = (
    "visit,person,part,died,grade,days,age,male\na,1,train,0,low,2.5,60,1\nb,1,train,1,high,,70,\nc,2,test,,2,9,,0\n"
)
HEAD = """
window = 10
[samples]
file = "samples.csv"
id = "visit"
subject = "person"
"""
SERIES = """
[modalities.vitals]
kind = "series"
file = "vitals.csv"
time = "hours"
columns = ["hr", "sbp"]
units = ["bpm", "mmHg"]
"""
TASKS = """
[tasks.dies]
kind = "binary"
column = "died"
[tasks.grade]
kind = "multiclass"
column = "grade"
classes = ["none", "low", "high"]
[tasks.days]
kind = "regression"
column = "days"
"""
VITALS = "visit,hours,hr,sbp\nb,5,80,\na,10,90,120\na,0,85,\na,1,,\n"


def folder(root: Path, description: str, **files: str | bytes) -> Path:
    """A raw folder; files are given with `__` for a slash and `_dot_` for a dot."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "flame.toml").write_text(description)
    for name, content in {"samples_dot_csv": SAMPLES, **files}.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(raw: Path, funnel: Funnel | None = None) -> dict[str, Sample]:
    modalities, tasks = SOURCE.describe(raw, FolderOptions())
    known = {m.name: m for m in modalities}, {t.name: t for t in tasks}
    stream = SOURCE.read(raw, FolderOptions(), Funnel() if funnel is None else funnel, Work(raw / ".steps"))
    return {sample.id: check_sample(sample, *known) for sample in stream}


def part(raw: Path, id: str, name: str) -> Any:
    return read(raw)[id].modalities[name]


def test_tables_become_series_and_labels(tmp_path: Path) -> None:
    funnel = Funnel()
    found = read(folder(tmp_path, HEAD + SERIES + TASKS, vitals_dot_csv=VITALS), funnel)
    assert {id: s.subject for id, s in found.items()} == {"a": "1", "b": "1"}
    vitals = found["a"].modalities["vitals"]
    assert vitals.times.tolist() == [0, 1]
    assert vitals.values.tolist() == [[85, 0], [90, 120]]
    assert vitals.observed.tolist() == [[True, False], [True, True]]
    labels = {id: {name: float(t[0]) for name, t in s.targets.items()} for id, s in found.items()}
    assert labels == {"a": {"dies": 0, "grade": 1, "days": 2.5}, "b": {"dies": 1, "grade": 2}}
    assert [step.after for step in funnel.steps] == [3, 2]


def test_wide_and_long_tables_packed_marked_and_columnar_give_the_same(tmp_path: Path) -> None:
    long = "visit,hours,name,number\na,0,hr,80\na,0,hr,90\na,10,sbp,120\na,10,hr,90\nb,5,hr,80\na,3,x,1\na,3,hr,\n"
    rule = SERIES.replace('columns = ["hr", "sbp"]', 'channel="name"\nvalue="number"\nchannels=["hr","sbp"]')
    marked = b"\xef\xbb\xbf" + VITALS.replace("\n", "\r\n").encode()
    wide = folder(tmp_path / "wide", HEAD + SERIES, vitals_dot_csv=VITALS)
    others = [
        folder(tmp_path / "long", HEAD + rule, vitals_dot_csv=long),
        folder(tmp_path / "mark", HEAD + SERIES, vitals_dot_csv=marked),
        folder(tmp_path / "gz", HEAD + SERIES.replace(".csv", ".csv.gz"), vitals_dot_csv_dot_gz=gzip.compress(marked)),
        folder(tmp_path / "pq", HEAD + SERIES.replace(".csv", ".parquet")),
    ]
    pl.read_csv(wide / "vitals.csv").write_parquet(tmp_path / "pq" / "vitals.parquet")
    expected = part(wide, "a", "vitals")
    for other in others:
        for a, b in zip(part(other, "a", "vitals"), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    funnel = Funnel()
    read(others[0], funnel)
    assert funnel.counts == {
        "vitals: row of a channel that is not in channels, left out": 1,
        "vitals: value of a channel at a time that has one already, taken into the mean": 1,
    }


def test_every_kind_that_lies_in_a_table(tmp_path: Path) -> None:
    description = f"""{HEAD}
    [modalities.static]
    kind = "table"
    file = "samples.csv"
    columns = ["age", "male"]
    [modalities.dx]
    kind = "codes"
    file = "dx.csv"
    time = "day"
    unit = "days"
    window = 48
    type = "sort"
    types = ["drug", "diagnosis"]
    [modalities.notes]
    kind = "text"
    file = "notes.csv"
    width = 16
    [modalities.vectors]
    kind = "timed"
    file = "vectors.csv"
    id = "who"
    columns = ["x", "y"]
    """
    raw = folder(
        tmp_path,
        description,
        dx_dot_csv="visit,day,sort,code\na,1,drug,aspirin\na,0.5,diagnosis,I50\na,2,drug,\n",
        notes_dot_csv='visit,text\na,"Pain, severe"\na,  \n',
        vectors_dot_csv="who,x,y\na,1,2\na,0,5\n",
    )
    sample = read(raw)["a"].modalities
    assert sample["static"].values.tolist() == [[60, 1]]
    assert sample["dx"].values.tolist() == [[1, code_id("I50")], [0, code_id("aspirin")]]
    assert sample["dx"].times.tolist() == [0.25, 0.5]
    np.testing.assert_array_equal(sample["notes"].values, embed_texts(["Pain, severe"], TextOptions(width=16)))
    assert sample["vectors"].values.tolist() == [[0, 5], [1, 2]]


def test_arrays_texts_and_pictures_by_sample_id(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    description = f"""{HEAD}
    [modalities.patches]
    kind = "patches"
    file = "patches.npz"
    [modalities.ecg]
    kind = "waveform"
    file = "ecg.npz"
    rate = 4
    seconds = 2
    [modalities.report]
    kind = "timed"
    file = "report.npz"
    [modalities.letter]
    kind = "text"
    folder = "letters"
    [modalities.xray]
    kind = "image"
    folder = "xray"
    shape = [2, 2, 1]
    """
    raw = folder(tmp_path, description, letters__a_dot_txt="Dear colleague", letters__b_dot_txt=" \n")
    np.savez(raw / "patches.npz", a=np.arange(6.0).reshape(3, 2), zz=np.zeros((1, 2)))
    np.savez(raw / "ecg.npz", b=np.array([0.0, np.nan, 2.0, 3, 4, 5, 6, 7, 8, 9]))
    np.savez(raw / "report.npz", **{"a": np.eye(2), "a.times": np.array([5.0, 10.0])})
    (raw / "xray" / "c").mkdir(parents=True)
    for i in range(2):
        image.fromarray(np.full((4, 4), 100 * i, np.uint8)).save(raw / "xray" / "c" / f"{i}.png")
    funnel = Funnel()
    found = read(raw, funnel)
    assert {id: sorted(s.modalities) for id, s in found.items()} == {
        "a": ["letter", "patches", "report"],
        "b": ["ecg"],
        "c": ["xray"],
    }
    assert found["a"].modalities["patches"].values.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found["a"].modalities["report"].times.tolist() == [0.5, 1]
    assert found["b"].modalities["ecg"].values.ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert found["c"].modalities["xray"].values.tolist() == [[0] * 4, [100] * 4]
    assert funnel.counts == {
        "ecg: missing sample of a waveform, filled from its neighbours": 1,
        "letter: blank text file, left out": 1,
        "patches: id that is not in the table of samples, left out": 1,
    }


def test_arrays_of_pictures_tables_and_series(tmp_path: Path) -> None:
    description = f"""{HEAD}
    [modalities.scan]
    kind = "image"
    file = "scan.npz"
    shape = [2, 2, 1]
    [modalities.genes]
    kind = "table"
    file = "genes.npz"
    [modalities.curve]
    kind = "series"
    file = "curve.npz"
    unit = "minutes"
    columns = ["x", "y"]
    """
    raw = folder(tmp_path, description)
    np.savez(raw / "scan.npz", a=np.arange(8, dtype=np.uint8).reshape(2, 2, 2), b=np.full((2, 2), 7, np.uint8))
    np.savez(raw / "genes.npz", a=np.array([1.0, np.nan, 3.0]))
    np.savez(raw / "curve.npz", **{"b": np.array([[1, np.nan], [np.nan, np.nan], [2, 3]]), "b.times": [0, 60, 600]})
    found = read(raw)
    assert found["a"].modalities["scan"].values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["b"].modalities["scan"].values.tolist() == [[7] * 4]
    assert found["a"].modalities["genes"].observed.tolist() == [[True, False, True]]
    assert found["b"].modalities["curve"].values.tolist() == [[1, 0], [2, 3]]
    assert found["b"].modalities["curve"].times.tolist() == [0, 1]
    np.savez(raw / "curve.npz", **{"b": np.ones((1, 2)), "b.times": [601]})
    with pytest.raises(DataError, match="times of 'b' are not in 0 to 10 h"):
        read(raw)
    np.savez(raw / "scan.npz", a=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"the array is float64 \(2, 2\), no uint8 pictures"):
        read(raw)


def test_records_and_volumes_of_the_open_data(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("wfdb")
    pytest.importorskip("nibabel")
    description = f"""{HEAD}
    [modalities.ecg]
    kind = "waveform"
    folder = "ecg"
    leads = ["v5", "MLII"]
    rate = 90
    seconds = 10
    [modalities.mri]
    kind = "volume"
    folder = "mri"
    size = [8, 8, 8]
    block = [4, 4, 8]
    """
    raw = folder(tmp_path, description)
    (raw / "ecg").mkdir()
    (raw / "mri").mkdir()
    for name in ("100.hea", "100.dat"):
        content = (shared_data / "wfdb-samples" / name).read_bytes()
        (raw / "ecg" / name).write_bytes(content)
    (raw / "ecg" / "100.hea").rename(raw / "ecg" / "a.hea")
    (raw / "ecg" / "a.hea").write_text((raw / "ecg" / "a.hea").read_text().replace("100 2", "a 2", 1))
    (raw / "mri" / "b.nii").write_bytes((shared_data / "nifti" / "anatomical.nii").read_bytes())
    found = read(raw)
    ecg = found["a"].modalities["ecg"].values
    assert ecg.shape == (900, 2)
    # 74 beats a minute are 12 upright peaks of MLII in ten seconds.
    mlii = ecg[:, 1] - np.median(ecg[:, 1])
    assert (np.diff((mlii > 0.6).astype(int)) == 1).sum() in (12, 13)
    assert found["b"].modalities["mri"].values.shape == (4, 128)


@pytest.mark.parametrize(
    ("description", "files", "message"),
    [
        (HEAD.replace("file", "fil") + SERIES, {}, "unknown key 'fil'.*Did you mean 'file'"),
        (HEAD + SERIES.replace("columns", "colums"), {}, "modalities.vitals: colums.*Did you mean 'columns'"),
        (HEAD + SERIES.replace('"series"', '"serie"'), {}, "unknown kind 'serie'.*Did you mean 'series'"),
        (HEAD + SERIES.replace("vitals.csv", "vital.csv"), {}, r"'vital.csv' is not there.*vitals.csv"),
        (HEAD + SERIES.replace('"hours"', '"hour"'), {}, "the column 'hour' is missing.*Did you mean 'hours'"),
        (HEAD + SERIES, {"vitals_dot_csv": "visit,hours,hr,sbp\na,1,high,\n"}, "'high' in column 'hr' is no number"),
        (HEAD + SERIES, {"vitals_dot_csv": "visit,hours,hr,sbp\na,-1,1,\n"}, "1 of 1 times are not in 0 to 10 h.*-1 h"),
        (HEAD + SERIES, {"vitals_dot_csv": "visit,hours,hr,sbp\na,11,1,\n"}, r"'a', is 11 h.*outside = 'drop'"),
        (HEAD + SERIES, {"vitals_dot_csv": "visit;hours;hr;sbp\na;1;1;\n"}, "the columns are separated by semicolons"),
        (HEAD + SERIES, {"vitals_dot_csv": b"visit,hours,hr,sbp\n\xe9,1,1,\n"}, "not UTF-8 text"),
        (HEAD + SERIES, {"vitals_dot_csv": "visit,hours,hr,sbp\n,1,1,\n"}, "1 rows have no id in column 'visit'"),
        (HEAD + SERIES, {"samples_dot_csv": "visit,person\na,1\na,2\n"}, "the id 'a' is there more than once"),
        (HEAD + 'unknown = "refuse"' + SERIES, {"vitals_dot_csv": VITALS + "z,1,1,1\n"}, "the id 'z' and 0 more"),
        (HEAD + SERIES + TASKS.replace("died", "dead"), {}, "the column 'dead' is missing.*Did you mean"),
        (HEAD + SERIES + TASKS.replace('"low"', '"lo"'), {}, r"the label 'low' is no class.*'grade', sample 'a'"),
        (HEAD + SERIES + TASKS.replace('"died"', '"age"'), {}, "the label '60' is no class"),
        (
            HEAD + SERIES + '[tasks.x]\nkind="binary"\ncolumn="died"\nmodalities=["vital"]',
            {},
            "unknown modality 'vital'",
        ),
        (HEAD + SERIES.replace("vitals.csv", "vitals.txt"), {}, "neither a table nor an array file"),
        (
            HEAD + TASKS + '[modalities.static]\nkind = "table"\nfile = "samples.csv"\ncolumns = ["age", "died"]',
            {},
            "the column 'died' is the label of task 'dies'",
        ),
        ("window = [", {}, "the description is not valid TOML"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_with_its_place(
    tmp_path: Path, description: str, files: dict[str, Any], message: str
) -> None:
    raw = folder(tmp_path, description, **{"vitals_dot_csv": VITALS, **files})
    with pytest.raises(FlameError, match=message) as caught:
        read(raw)
    assert "\n" not in str(caught.value)


def test_times_outside_the_window_and_unknown_ids_are_left_out_and_counted_where_that_is_asked(tmp_path: Path) -> None:
    text = VITALS + "a,11,1,1\na,-1,1,1\na,,1,1\nz,1,1,1\n"
    funnel = Funnel()
    raw = folder(tmp_path, HEAD + SERIES + 'outside = "drop"', vitals_dot_csv=text)
    assert read(raw, funnel)["a"].modalities["vitals"].times.tolist() == [0, 1]
    assert funnel.counts == {
        "vitals: id that is not in the table of samples, left out": 1,
        "vitals: row with a time that is missing or not in 0 to 10 h, left out": 3,
    }


def test_a_split_of_the_table_is_kept_and_new_records_need_no_labels(tmp_path: Path) -> None:
    vitals = VITALS + "c,1,70,100\n"
    fixed = HEAD + 'split = "part"\n' + SERIES + TASKS.split("[tasks.grade]")[0]
    rows = SAMPLES.replace("c,2,test,,", "c,2,val,1,") + "d,3,test,1,low,1,50,1\n"
    raw = folder(tmp_path / "raw", fixed, vitals_dot_csv=vitals + "d,1,1,1\n", samples_dot_csv=rows)
    assert prepare("folder", raw, tmp_path / "store").splits.tolist() == [0, 0, 1, 2]
    new = folder(tmp_path / "new", HEAD + SERIES + TASKS, vitals_dot_csv=vitals, samples_dot_csv="visit,person\na,1\n")
    store = prepare("folder", new, tmp_path / "scored", require_labels=False)
    assert list(store.ids(np.arange(len(store)))) == ["a"]
    assert set(store.tasks) == {"dies", "grade", "days"}


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "sources" / "folder.md"
    blocks = dict(re.findall(r"`mydata/([\w.]+)`[^`]*```\w+\n(.*?)```", page.read_text(), flags=re.DOTALL))
    assert set(blocks) == {"stays.csv", "vitals.csv", "flame.toml"}
    (tmp_path / "letters").mkdir()
    for name, text in {**blocks, "letters/s1.txt": "Dear colleague", "letters/s3.txt": "Dear all"}.items():
        (tmp_path / name).write_text(text)
    found = read(tmp_path)
    assert {id: sorted(s.modalities) for id, s in found.items()} == {
        "s1": ["letters", "static", "vitals"],
        "s2": ["static", "vitals"],
        "s3": ["letters", "static"],
    }
    assert [float(s.targets["died"][0]) for s in found.values()] == [0, 1, 0]


def test_a_draft_works_as_it_is_and_keeps_outcomes_out_of_the_inputs(tmp_path: Path) -> None:
    samples = "".join(f"s{i},p{i // 2},{50 + i},{i % 2},{i % 3 == 0:d},{i}.5\n" for i in range(60))
    vitals = "".join(f"s{i},{30 * h},{80 + h},{120 + i}\n" for i in range(60) for h in range(3))
    labs = "".join(f"s{i},{h},{'K' if h else 'Na'},{h}.5\n" for i in range(60) for h in range(2))
    note = "".join(f's{i},"A long note with quite a few words about {i}."\n' for i in range(60))
    files = {
        "stays.csv": "stay_id,patient_id,age,male,died,los_days\n" + samples,
        "vitals.csv": "stay_id,minutes,hr,sbp\n" + vitals,
        "labs.csv": "stay_id,hour,test,result\n" + labs,
        "notes.csv": "stay_id,note\n" + note,
        "drugs.csv": "stay_id,hour,drug\n" + "".join(f"s{i},1,aspirin\n" for i in range(60)),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    np.savez(tmp_path / "scan.npz", **{f"s{i}": np.full((2, 3), i, dtype=float) for i in range(60)})
    done = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert (done.exit_code, "Read and correct it" in done.output) == (0, True)
    modalities, tasks = SOURCE.describe(tmp_path, FolderOptions())
    assert {m.name: m.kind for m in modalities} == {
        "static": "table",
        "vitals": "series",
        "labs": "series",
        "notes": "timed",
        "drugs": "codes",
        "scan": "patches",
    }
    assert {t.name: t.kind for t in tasks} == {"died": "binary", "los_days": "regression"}
    assert {m.name: m.channels for m in modalities}["static"] == ("age", "male")
    store = prepare("folder", tmp_path, tmp_path / "store")
    assert (len(store), store.sample(0).modalities["vitals"].values.shape) == (60, (3, 2))
    with pytest.raises(DataError, match="there is a description already"):
        write_draft(tmp_path)


def test_a_folder_without_unique_ids_gets_no_draft(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,x\na,1\na,1\n")
    with pytest.raises(DataError, match="no table has a column of unique ids"):
        write_draft(tmp_path)
