"""Tables larger than memory: the same rows in the same order wherever a slice ends, and never many slices at once."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_moe.data import slices
from flame_moe.data.slices import read_slices, write_slices
from flame_moe.data.tables import explain
from flame_moe.errors import DataError

COLUMNS: dict[str, Any] = {"a": pl.Int64, "s": pl.String}
MANY = b"a,s\n" + b"".join(b"%d,z%d\n" % (i, i * i) for i in range(20_000))


def read(path: Path, told: list[float] | None = None, **options: Any) -> list[pl.DataFrame]:
    watch = (lambda share: None) if told is None else told.append
    with explain(str(path)):
        return list(read_slices(path, COLUMNS, lambda rows: rows, watch, **options))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet='ab",\n', min_size=1, max_size=9), max_size=30),
    size=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.booleans(),
    last=st.booleans(),
)
def test_rows_are_the_same_wherever_a_slice_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], size: int, end: str, packed: bool, last: bool
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    writer.writerows([("a", "s"), *enumerate(texts)])
    content = text.getvalue().encode() if last else text.getvalue().removesuffix(end).encode()
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    members = (content[: len(content) // 3], content[len(content) // 3 :])
    path.write_bytes(b"".join(map(gzip.compress, members)) + bytes(512) if packed else content)
    monkeypatch.setattr(slices, "SLICE", size)
    found = [row for part in read(path) for row in part.rows()]
    assert found == [(i, s.strip() or None) for i, s in enumerate(texts)]


def test_parquet_is_read_in_slices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"b": [0] * 1000, "A": range(1000), "s": [f"{i}" for i in range(1000)]})
    frame.write_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(slices, "_ROWS", 300)
    told: list[float] = []
    found = read(tmp_path / "t.parquet", told, keep={"a": range(290, 310)})
    assert [len(part) for part in found] == [0, 10, 10, 0, 0]
    assert pl.concat(found).rows() == [(i, str(i)) for i in range(290, 310)]
    assert told == [0, 0.3, 0.6, 0.9, 1.0]


@pytest.mark.parametrize("packed", [False, True])
def test_only_a_few_slices_are_in_memory_and_it_is_told_how_far_the_reading_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(MANY) if packed else MANY)
    monkeypatch.setattr(slices, "SLICE", 2048)
    monkeypatch.setattr(slices, "_PIECE", 512)
    made = 0

    def counted(file: Any) -> Any:
        nonlocal made
        for piece in original(file):
            made += 1
            yield piece

    original = slices._unpacked if packed else slices._pieces
    monkeypatch.setattr(slices, "_unpacked" if packed else "_pieces", counted)
    told: list[float] = []
    most = total = 0
    for number, part in enumerate(read_slices(path, COLUMNS, lambda rows: rows, told.append)):
        most = max(most, made - number)
        total += len(part)
    assert total == 20_000
    assert made > 50
    assert most <= slices._THREADS + 3
    assert told == sorted(told)
    assert told[0] < 0.2
    assert told[-1] == 1.0


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    for name, content in (("a.csv", b"a,s"), ("b.csv", b"a,s\n"), ("c.csv.gz", gzip.compress(b"a,s\n"))):
        (tmp_path / name).write_bytes(content)
        (part,) = read(tmp_path / name)
        assert part.schema == COLUMNS
        assert part.is_empty()


def test_a_packed_table_that_is_cut_off_or_changed_is_refused(tmp_path: Path) -> None:
    whole, path = gzip.compress(MANY), tmp_path / "t.csv.gz"
    for end in (len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"damaged or cut off \[.*t.csv.gz\]"):
            read(path)
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)
    path.write_bytes(whole + b"no gzip")
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)


def test_a_quotation_mark_that_is_never_closed_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_bytes(b'a,s\n1,"never closed\n' + MANY)
    monkeypatch.setattr(slices, "SLICE", 2048)
    monkeypatch.setattr(slices, "_LONGEST", 8192)
    with pytest.raises(DataError, match=r"a quotation mark is opened and never closed \[.*t.csv\]"):
        read(tmp_path / "t.csv")


def test_slices_are_written_in_order_and_neighbours_share_a_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "_ROW_GROUP", 250)
    frames = [pl.DataFrame({"a": range(i, i + 100), "s": [None] * 100}, schema=COLUMNS) for i in range(0, 1000, 100)]
    write_slices(tmp_path / "t.parquet", [frames[0].clear(), *frames])
    assert pl.read_parquet(tmp_path / "t.parquet").equals(pl.concat(frames))
    about = pq.read_metadata(tmp_path / "t.parquet")
    groups = [about.row_group(i).column(0).statistics for i in range(about.num_row_groups)]
    assert [(group.min, group.max) for group in groups] == [(0, 299), (300, 599), (600, 899), (900, 999)]
