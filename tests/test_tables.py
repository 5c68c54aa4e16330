"""Tables as releases really come: packed or plain, with marks and blanks, cut off, with wrong cells."""

from __future__ import annotations

import gzip
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flame_moe.data.slices import read_slices
from flame_moe.data.tables import collect, column_names, find_table, need_table, scan_table
from flame_moe.data.work import Make, Work
from flame_moe.errors import DataError

COLUMNS: dict[str, Any] = {"a": pl.Int64, "t": pl.Datetime, "x": pl.Float64, "s": pl.String}
HEADER = b"a,t,x,s\n"
LONG = HEADER + b"".join(b"%d,2100-01-01 00:00:00,%d.5,z%d\n" % (i, i * 7 % 13, i * i) for i in range(50_000))


def table(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def rows(path: Path, **options: Any) -> list[tuple[Any, ...]]:
    return collect(scan_table(path, COLUMNS, **options), path).rows()


def whole(path: Path) -> Make:
    """The table as a step, as it is."""
    return partial(read_slices, path, COLUMNS, lambda rows: rows)


def test_marks_blanks_line_ends_and_case_of_names_are_understood(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfA, t,"X",s\r\n1, ,1.5,\r\n,,,  hi \r\n2,,3,"he said ""no"",\nand left"\r\n'
    found = rows(table(tmp_path, "odd.csv", content))
    assert found == [(1, None, 1.5, None), (None, None, None, "hi"), (2, None, 3.0, 'he said "no",\nand left')]


def test_names_of_columns_may_hold_commas_and_quotes(tmp_path: Path) -> None:
    path = table(tmp_path, "quoted.csv", b'"pressure, mean (mmHg)",a,"the ""x"""\r\n75.5,1,2\r\n')
    names = ["pressure, mean (mmHg)", "a", 'the ""x""']
    assert column_names(path) == names
    assert collect(scan_table(path, dict.fromkeys(names, pl.Float64)), path).rows() == [(75.5, 1.0, 2.0)]


def test_packed_and_plain_tables_and_parquet_give_the_same(tmp_path: Path) -> None:
    plain = table(tmp_path, "plain.csv", LONG)
    packed = table(tmp_path, "packed.csv.gz", gzip.compress(LONG))
    collect(scan_table(plain, COLUMNS), plain).write_parquet(tmp_path / "columnar.parquet")
    assert rows(plain) == rows(packed) == rows(tmp_path / "columnar.parquet")
    assert len(rows(plain)) == 50_000


def test_a_column_that_may_be_missing_is_empty(tmp_path: Path) -> None:
    assert rows(table(tmp_path, "less.csv", b"a,t,s\n1,,z\n"), optional=["x"]) == [(1, None, None, "z")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lacks.csv", b"a,t,xx,s\n1,,2,\n", r"the column 'x' is missing \[.*lacks.csv\]. Did you mean 'xx'"),
        ("word.csv", HEADER + b"1,,abc,\n", r"'abc' in column 'x' is no number \[.*word.csv\]"),
        ("half.csv", HEADER + b"1.5,,2,\n", r"'1.5' in column 'a' is no whole number"),
        ("date.csv", HEADER + b"1,01/02/2100,2,\n", r"'01/02/2100' in column 't' is no time"),
        ("latin.csv", HEADER + "1,,2,caf\xe9\n".encode("latin-1"), "not UTF-8 text"),
        ("late.csv", LONG + "1,,2,caf\xe9\n".encode("latin-1"), "not UTF-8 text.*iconv"),
        ("utf16.csv", LONG.decode().encode("utf-16"), "not UTF-8 text"),
        ("latin-name.csv", "a,t,x,s,\xe9\n1,,2,z,\n".encode("latin-1"), "not UTF-8 text"),
        ("mac.csv", LONG[:200].replace(b"\n", b"\r"), "the lines end in carriage returns alone"),
        ("day.csv", HEADER + b"1,2100-02-30 00:00:00,2,\n", r"'2100-02-30 00:00:00' in column 't' is no time"),
        ("hour.csv", HEADER + b"1,2100-02-03 25:00:00,2,\n", r"'2100-02-03 25:00:00' in column 't' is no time"),
        ("wide.csv", HEADER + b"1,,2,a,b,c\n", "the table cannot be read"),
        ("empty.csv", b"", "the file is empty"),
        ("cut.csv.gz", gzip.compress(LONG)[: len(gzip.compress(LONG)) // 2], "damaged or cut off"),
        ("stub.csv.gz", gzip.compress(LONG)[:4], "damaged or cut off"),
        ("plain.csv.gz", LONG, "damaged or cut off"),
        ("no.parquet", b"PAR1 and no more", r"\[.*no.parquet\]"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows(table(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_table_is_found_whatever_its_suffix_and_case(tmp_path: Path) -> None:
    (tmp_path / "hosp").mkdir()
    path = table(tmp_path / "hosp", "PATIENTS.csv.gz", gzip.compress(LONG))
    assert find_table(tmp_path, "hosp/patients") == path
    assert find_table(tmp_path, "icu/patients") is None
    with pytest.raises(DataError, match=r"the table 'hosp/admissions' is missing .* It is part of MIMIC-IV\."):
        need_table(tmp_path, "hosp/admissions", "MIMIC-IV")
    table(tmp_path / "hosp", "patients.csv", LONG)
    with pytest.raises(DataError, match="the table 'hosp/patients' is there twice"):
        find_table(tmp_path, "hosp/patients")


def test_a_finished_step_is_not_redone_unless_what_it_depends_on_changes(tmp_path: Path) -> None:
    path, said = table(tmp_path, "t.csv", LONG), list[tuple[str, float | None]]()
    work = Work(tmp_path / "steps", lambda text, share=None: said.append((text, share)))

    def step(version: int) -> int:
        return work.step("t", [path], {"version": version}, whole(path)).collect().height

    assert [step(1), step(1), step(2)] == [50_000] * 3
    assert said == [("t", 0.0), ("t", 1.0)] * 2
    table(tmp_path, "t.csv", LONG + b"7,,,\n")
    assert step(1) == 50_001
    (tmp_path / "labels").mkdir()
    work.note(table(tmp_path / "labels", "t.csv", HEADER))
    assert list(work.inputs(tmp_path)) == ["labels/t.csv", "t.csv"]
    assert list(work.inputs(tmp_path / "labels")) == ["../t.csv", "t.csv"]
    work.clear()
    assert not (tmp_path / "steps").exists()


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = table(tmp_path, "cut.csv.gz", gzip.compress(LONG)[:9000])
    work = Work(tmp_path / "steps")
    with pytest.raises(DataError, match=r"damaged or cut off \[.*cut.csv.gz\]"):
        work.step("t", [path], {}, whole(path))
    assert list((tmp_path / "steps").iterdir()) == []


def test_rows_that_are_not_asked_for_are_left_out_and_not_checked(tmp_path: Path) -> None:
    content = HEADER + b" 7 ,2100-01-01 00:00:00,1.5,a\n8,no time,no number,b\n,,,\n7,,,c\n"
    plain = table(tmp_path, "t.csv", content)
    found = rows(plain, keep={"a": {7, 9}})
    assert found == [(7, datetime(2100, 1, 1), 1.5, "a"), (7, None, None, "c")]
    collect(scan_table(plain, COLUMNS, keep={"a": [7]}), plain).write_parquet(tmp_path / "t.parquet")
    assert rows(tmp_path / "t.parquet", keep={"s": ["c"]}) == found[1:]
    assert rows(plain, keep={"a": []}) == []
