"""Any file that people keep rows in, as rows: one at a time, in flat memory, the damaged ones named.

What a file is is read from its first bytes, and from its name where they don't say.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from preceptor.core.errors import UserError
from preceptor.data import objects
from preceptor.data.decode import LOST, PACKED, Text, library
from preceptor.data.objects import FIRSTS, TOO_LONG, BadRow, Row, json_object, json_value

__all__ = ["BadRow", "Row", "json_object", "json_value", "rows"]

_REFUSED = {
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file: save it as XLSX or CSV",
    b"BZh": "packed by bzip2: unpack it first",
    b"\xfd7zXZ": "packed by xz: unpack it first",
    b"%PDF": "a PDF: save its cases as JSONL or CSV",
}
_TABLES = {b"PAR1": "parquet", b"PK\x03\x04": "xlsx"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet", ".xlsx": "xlsx"}
_MERGE, _LONGEST_MERGE = re.compile(rb'mergeCell\s[^<>]*?ref="([A-Z]+\d+:[A-Z]+\d+)"'), 100
_JSON, _TABBED = (".json", ".jsonl", ".ndjson"), (".tsv", ".tab")


def rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Every row of a file with the line on which it starts, from 1; of Parquet and XLSX, its row's number.

    Reads JSONL, JSON (a list, `{"data": [...]}`, objects one after another), CSV, TSV, Parquet and XLSX (its first
    sheet, and those with the same columns, whose rows are counted on); text in UTF-8, UTF-16 with its mark, or
    GB18030; packed by gzip or zstd or not. What can't be read is a `BadRow` in its place, and so is the end of a
    file that was cut off. Blank lines are no rows.

    Raises:
        UserError: the file is of a kind that isn't read here, or needs a library that isn't installed.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: it is {what}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    known = (kind for magic, kind in (PACKED | _TABLES).items() if head.startswith(magic))
    kind = next(known, _SUFFIXES.get(suffixes[-1] if suffixes else ""))
    if kind in _TABLES.values():
        yield from (_parquet if kind == "parquet" else _xlsx)(path)
        return
    text = Text(path, kind)
    suffix = next((suffix for suffix in reversed(suffixes) if suffix not in _SUFFIXES), "")
    if text.head.startswith(("PAR1", "PK\x03\x04")):
        raise UserError(f"{path}: it is a packed {'Parquet' if text.head[1] == 'A' else 'XLSX'} file: unpack it first")
    if objects.is_document(text, suffix):
        yield from objects.document(text)
    elif re.match(r'[\s\ufeff]*(?:\{\s*["}]|\[)', text.head) or suffix in _JSON:
        yield from objects.lines(text)
    else:
        yield from _csv(text, suffix)
    if text.broken:
        yield text.line, BadRow("", text.broken)


class _Fed:
    """Lines for the CSV reader, which remembers what it took for the row at hand."""

    def __init__(self, lines: Iterator[tuple[int, str | None]]) -> None:
        self._lines = lines
        self._again: deque[tuple[int, str | None]] = deque()
        self.taken: list[tuple[int, str | None]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        taken = self._next()
        if taken is None:
            raise StopIteration
        self.taken.append(taken)
        line = taken[1]
        if line is None:
            raise BadRow("", TOO_LONG)
        return line

    def _next(self) -> tuple[int, str | None] | None:
        return self._again.popleft() if self._again else next(self._lines, None)

    def back(self, begins: Callable[[str | None], bool]) -> list[int]:
        """Gives back all but the first line, passes by those that begin no row, and returns their numbers."""
        self._again.extendleft(reversed(self.taken[1:]))
        passed = []
        for number, line in iter(self._next, None):
            if begins(line):
                self._again.appendleft((number, line))
                break
            passed.append(number)
        return passed


def _csv(text: Text, suffix: str) -> Iterator[tuple[int, Row]]:
    """Rows by the names in the first line.

    After a broken one that may span lines, the next is looked for by what the first fields of whole rows look
    like, since a line within a text may well have as many commas as a row.
    """
    first = re.sub(r'"[^"]*"', "", text.head.lstrip().partition(text.newline)[0])
    separator = "\t" if suffix in _TABBED else max(",\t;|", key=first.count)
    fed, names, shapes, spanning = _Fed(text.lines()), list[str](), set[str](), False
    reader = csv.reader(fed, delimiter=separator, strict=True)

    def begins(line: str | None) -> bool:
        return not (spanning and 0 < len(shapes) < FIRSTS) or _shape(line, separator) in shapes

    while True:
        fed.taken = []
        try:
            values = next(reader)
            row = _named(names, values)
        except StopIteration:
            return
        except (BadRow, csv.Error) as error:
            why = f"not CSV ({error}): a quote within a quoted field must be doubled"
            row = error if isinstance(error, BadRow) else BadRow("", why)
        (number, line), spanning = fed.taken[0], spanning or len(fed.taken) > 1
        if names and row:
            yield number, row
        if isinstance(row, BadRow):
            if passed := fed.back(begins):
                yield passed[0], BadRow("", f"lines {passed[0]} to {passed[-1]} belong to no row that can be told")
            reader = csv.reader(fed, delimiter=separator, strict=True)
            values = (line or "").split(separator)
        elif row and len(shapes) < FIRSTS:
            shapes.add(_shape(line, separator))
        names = names or _names([value.strip(' "\r\n\t') for value in values])


def _shape(line: str | None, separator: str) -> str:
    """What the first field looks like: 2024-A17 is 9-a9."""
    first = (line or "").split(separator, 1)[0].strip('" ')
    return re.sub(r"[^\W\d]+", "a", re.sub(r"\d+", "9", first))[:40]


def _names(values: list[str]) -> list[str]:
    """The names of columns: one for those without, and a number for those whose name was there before."""
    names: list[str] = []
    for place, value in enumerate(values, 1):
        name = value.strip("\ufeff").replace(LOST, "\ufffd") or f"column {place}"
        names.append(name if name not in names else f"{name} ({place})")
    return names if any(values) else []


def _named(names: list[str], values: list[Any]) -> Row:
    if not names or all(value is None or value == "" for value in values):
        return {}
    if len(values) < len(names) or any(value not in (None, "") for value in values[len(names) :]):
        return BadRow("", f"{len(values)} fields where the header has {len(names)}")
    row = dict(zip(names, values, strict=False))
    lost = next((name for name, value in row.items() if isinstance(value, str) and LOST in value), None)
    return row if lost is None else BadRow(lost, "not in the file's encoding")


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    parquet = library("pyarrow.parquet", "Parquet files")
    after = 1
    try:
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            number, after = after, after + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    for row in _batch(batch):
                        yield number, row
                        number += 1
                if number < after:
                    raise EOFError("they are missing")
            except Exception as error:  # noqa: BLE001  a damaged file fails in any way it likes
                yield number, BadRow("", f"rows {number} to {after - 1} can't be read ({error})")
        if after <= file.metadata.num_rows:
            raise EOFError(f"rows {after} to {file.metadata.num_rows} are missing")
    except Exception as error:  # noqa: BLE001  as above
        yield after, BadRow("", f"not a whole Parquet file ({error})")


def _batch(batch: Any) -> list[Row]:
    try:
        return [json_value(row) for row in batch.to_pylist()]
    except Exception as error:  # noqa: BLE001  text that isn't UTF-8, dates that Python has no room for
        if batch.num_rows == 1:
            return [BadRow("", f"a value can't be read ({error})")]
        return [row for place in range(batch.num_rows) for row in _batch(batch.slice(place, 1))]


def _xlsx(path: Path) -> Iterator[tuple[int, Row]]:
    openpyxl = library("openpyxl", "XLSX files")
    number, header = 0, list[str]()
    try:
        with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book, ZipFile(path) as parts:
            for sheet in book.worksheets:
                names, other = (
                    list[str](),
                    BadRow("", f"the sheet {sheet.title!r} has other columns: save it by itself"),
                )
                for values in _cells(sheet, parts):
                    number += 1
                    if not names:
                        names = _names(["" if value is None else str(value).strip() for value in values])
                        header = header or names
                        row: Row = {} if names in ([], header) else other
                    else:
                        row = _named(names, [*values, *[None] * (len(names) - len(values))])
                        row = other if row and names != header else row
                    if row:
                        yield number, row
    except Exception as error:  # noqa: BLE001  a damaged file fails in any way it likes
        yield number + 1, BadRow("", f"not a whole XLSX file ({type(error).__name__}: {error})")


def _cells(sheet: Any, parts: ZipFile) -> Iterator[list[Any]]:
    """The rows of a sheet. What is merged downwards stands in each of its rows, as it does for who looks at it."""
    merged: dict[int, dict[int, int]] = {}
    for match in _merges(parts, sheet._worksheet_path):  # noqa: SLF001  read row by row, a sheet doesn't tell of them
        column, first, _, last = library("openpyxl.utils", "XLSX files").range_boundaries(match[1].decode())
        merged.setdefault(first, {})[column - 1] = last
    held: dict[int, tuple[int, Any]] = {}
    sheet.reset_dimensions()  # programs write wrong ones
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        values = [json_value(cell) for cell in cells]
        for column, (last, value) in held.items():
            if number <= last and column < len(values) and values[column] is None:
                values[column] = value
        starting = merged.get(number, {}).items()
        held |= {column: (last, values[column]) for column, last in starting if column < len(values)}
        yield values


def _merges(parts: ZipFile, name: str) -> Iterator[re.Match[bytes]]:
    """Where a sheet says that cells are merged: behind all of its rows."""
    with parts.open(name) as file:
        text = b""
        while piece := file.read(1 << 20):
            text = text[-_LONGEST_MERGE:] + piece
            yield from _MERGE.finditer(text)
