"""A user's table of the names of diseases: `name`, `code`, and `aliases` with | or ； between them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preceptor.clinical.names import Entry
from preceptor.core.errors import UserError
from preceptor.core.records import Issue
from preceptor.data.rows import BadRow, Row, rows

_CODE = re.compile(r"[A-Z]\d[0-9A-Z](?:\.?[0-9A-Zx]{1,8})?[*+†]?")
_SEPARATOR = re.compile(r"[|｜;；\n]")
_COLUMNS = ("name", "code", "aliases")


def read(path: Path) -> Iterator[Entry | Issue]:
    """The diseases of a table in any file that `rows` reads, and what is wrong with the rows of the others.

    Raises:
        UserError: the file has no column `name`.
    """
    for line, row in rows(path):
        if not isinstance(row, BadRow) and "name" not in _plain(row):
            there = ", ".join(row)[:200]
            raise UserError(f"{path}:{line}: no column 'name' in it (there are {there}); write {','.join(_COLUMNS)}")
        try:
            entry = _entry(row)
        except BadRow as error:
            yield Issue(file=str(path), line=line, field=error.field, reason=error.reason, action="dropped")
            continue
        if entry.code and not _CODE.fullmatch(entry.code):
            reason = f"{entry.code!r} is no ICD-10 code: the name is taken without one"
            yield Issue(file=str(path), line=line, field="code", reason=reason, action="changed")
            entry = Entry(entry.name, aliases=entry.aliases)
        yield entry


def _entry(row: Row) -> Entry:
    if isinstance(row, BadRow):
        raise row
    name, code, aliases = (_said(_plain(row).get(column)) for column in _COLUMNS)
    for field, given in (("name", name), ("aliases", aliases)):
        if (given or field == "name") and not re.search(r"[^\W\d_]", given):
            raise BadRow(field, f"{given!r} holds no word" if given else "it is empty")
    known = (alias.strip() for alias in _SEPARATOR.split(aliases))
    return Entry(name, code.upper().replace("X", "x"), tuple(alias for alias in known if alias))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.strip().casefold(): value for key, value in row.items()}


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(_said, value))
    return "" if value is None else str(value).strip()
