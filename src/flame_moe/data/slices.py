"""A table of any size in slices that fit into memory, in the order of the file, and how far the reading is.

A slice of a CSV table is about 8 MB of text, cut where a record ends. One thread reads and unpacks the file, others
parse slices, a few at a time. Memory therefore depends on the size of a slice and not on that of the table.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow.parquet as pq

from flame_moe.data.tables import column_names, narrowing
from flame_moe.errors import DataError

Watch = Callable[[float], None]
"""Told the share of the file, 0 to 1, that has been read."""

Each = Callable[[pl.LazyFrame], pl.LazyFrame]

SLICE = 8 << 20
_PIECE = 1 << 20
_LONGEST = 32 * SLICE
_THREADS = min(4, os.cpu_count() or 1)
_ROWS = 1 << 17
_ROW_GROUP = 1 << 18


def read_slices(
    path: Path,
    columns: Mapping[str, pl.DataType | type[pl.DataType]],
    each: Each,
    watch: Watch,
    *,
    optional: Sequence[str] = (),
    keep: Mapping[str, Collection[Any]] | None = None,
) -> Iterator[pl.DataFrame]:
    """What `scan_table` reads, slice by slice through `each`; there is always at least one slice, which may be empty.

    Args:
        path, columns, optional, keep: as of `scan_table`.
        each: what becomes of a slice. It must not depend on where slices begin: filters, joins with other tables and
            new columns, but no groups.
        watch: told how far the reading is, after every slice.

    Raises:
        DataError: as `scan_table`; what is wrong with cells and packed files shows inside `explain`.
    """
    narrow = narrowing(path, columns, optional=optional, keep=keep)
    wanted = {name.lower() for name in columns}
    names = [name for name in column_names(path) if name.strip().lower() in wanted]
    parts = _parquet(path, names) if path.suffix == ".parquet" else _csv(path)
    waiting: deque[tuple[Future[pl.DataFrame], float]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for part, share in parts:
            waiting.append((pool.submit(lambda rows: each(narrow(rows)).collect(), part), share))
            if len(waiting) > _THREADS:
                yield from _first(waiting, watch)
        while waiting:
            yield from _first(waiting, watch)


def _first(waiting: deque[tuple[Future[pl.DataFrame], float]], watch: Watch) -> Iterator[pl.DataFrame]:
    frame, share = waiting.popleft()
    yield frame.result()
    watch(share)


def write_slices(path: Path, frames: Iterable[pl.DataFrame]) -> None:
    """Append frames with the same columns to a new Parquet file, in row groups of some 260,000 rows.

    Row groups keep the order of the frames, so that a reader of neighbours skips most of them.
    """
    frames = iter(frames)
    waiting = [next(frames)]
    with pq.ParquetWriter(path, waiting[0].to_arrow().schema, compression="zstd") as writer:
        for frame in chain(frames, [None]):
            if frame is None or sum(map(len, waiting)) >= _ROW_GROUP:
                writer.write_table(pl.concat(waiting).to_arrow())
                waiting = []
            if frame is not None:
                waiting.append(frame)


def _csv(path: Path) -> Iterator[tuple[pl.LazyFrame, float]]:
    size = max(1, path.stat().st_size)
    with path.open("rb") as file:
        for text in _records(_unpacked(file) if path.suffix == ".gz" else _pieces(file), path):
            yield pl.scan_csv(text, infer_schema=False), file.tell() / size


def _parquet(path: Path, names: list[str]) -> Iterator[tuple[pl.LazyFrame, float]]:
    with pq.ParquetFile(path, buffer_size=_PIECE) as file:
        rows, read = max(1, file.metadata.num_rows), 0
        yield pl.DataFrame(file.schema_arrow.empty_table().select(names)).lazy(), 0.0
        for batch in file.iter_batches(_ROWS, columns=names):
            read += batch.num_rows
            yield pl.DataFrame(batch).lazy(), read / rows


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(SLICE):
        yield piece


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    """The text of a gzip file of one or several members, which may be padded with zeros, at most a slice at a time."""
    decoder, data = zlib.decompressobj(wbits=31), b""
    while True:
        data = data or file.read(_PIECE)
        if decoder.eof:
            data = data.lstrip(b"\0")
            if data:
                decoder = zlib.decompressobj(wbits=31)
        piece = b"" if decoder.eof else decoder.decompress(data, SLICE)
        if not data and not piece:
            break
        yield piece
        data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    if not decoder.eof:
        raise EOFError("unexpected end of file")


def _records(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Header and whole records, again and again; the header alone if there is nothing else."""
    first = next(pieces, b"")
    while b"\n" not in first and (more := next(pieces, b"")):
        first += more
    header = first[: first.find(b"\n") + 1 or len(first)]
    rest, quoted, told = [b""], False, False
    for piece in chain([first[len(header) :]], pieces):
        end = _end_of_records(piece, quoted)
        if end:
            yield b"".join((header, *rest, memoryview(piece)[:end]))
            told, rest, quoted = True, [], False
        rest.append(piece[end:])
        quoted ^= bool(piece.count(b'"', end) % 2)
        if sum(map(len, rest)) > _LONGEST:
            what = f"a line is longer than {_LONGEST >> 20} MB: a quotation mark is opened and never closed"
            raise DataError(what, where=str(path), mend="Mend the table, or fetch it again.")
    if any(rest) or not told:
        yield b"".join((header, *rest))


def _end_of_records(piece: bytes, quoted: bool) -> int:
    """Just behind the last line end that is in no quoted cell; 0 if there is none.

    Args:
        piece: of a table.
        quoted: whether it begins inside a quoted cell.
    """
    end = piece.rfind(b"\n") + 1
    quoted ^= bool(piece.count(b'"', 0, end) % 2)
    while quoted and end:
        begin = piece.rfind(b"\n", 0, end - 1) + 1
        quoted ^= bool(piece.count(b'"', begin, end) % 2)
        end = begin
    return end
