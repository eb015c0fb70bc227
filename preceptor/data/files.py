"""Raw files to cases, one row at a time: a bad row stops nothing and is never silent."""

import hashlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from preceptor.core.errors import UserError, WorkError
from preceptor.core.records import Case, Issue
from preceptor.data import ddxplus, hub
from preceptor.data.check import LONGEST
from preceptor.data.layouts import DDXPLUS, LAYOUTS, SAMPLE, Importer, detect, instruction_importer
from preceptor.data.rows import BadRow, Row, rows

_DIGEST = re.compile(r"row-[0-9a-f]{16}")


@dataclass(frozen=True)
class Imported:
    """A case, and the line of its file on which it starts."""

    line: int
    case: Case


class Ids:
    """The ids that were met, where and with what: in a temporary file, so that memory doesn't grow with them."""

    def __init__(self) -> None:
        self._met = sqlite3.connect("", isolation_level=None)  # SQLite's own temporary file
        self._met.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-32768;"
            "CREATE TABLE met (id INTEGER, text INTEGER, gold INTEGER, place TEXT);"
            "CREATE INDEX by_id ON met (id); BEGIN"
        )
        self._again: Counter[str] = Counter()

    def first(self, case: Case, source: str, line: int) -> str | None:
        """Where the id was met before, if it was; this row is remembered."""
        before = self.where(case.id)
        row = _digest(case.id), _digest(case.text), _digest(str(case.gold)), f"{source}:{line}"
        self._met.execute("INSERT INTO met VALUES (?, ?, ?, ?)", row)
        return before

    def where(self, identity: str) -> str | None:
        """Where an id was met first."""
        found = self._met.execute("SELECT place FROM met WHERE id = ? ORDER BY rowid LIMIT 1", (_digest(identity),))
        return next((place for (place,) in found), None)

    def has(self, case: Case, *, answered: bool = False) -> bool:
        """Whether the id was met with this very text, or with text and answer."""
        rows = self._met.execute("SELECT text, gold FROM met WHERE id = ?", (_digest(case.id),))
        text, gold = _digest(case.text), _digest(str(case.gold))
        return any(text == other and (gold == said or not answered) for other, said in rows)

    def next(self, identity: str) -> str:
        """The id of one more row that has another's."""
        self._again[identity] += 1
        name = f"{identity}-{self._again[identity] + 1}"
        return name if self.where(name) is None else self.next(identity)


def _digest(text: str) -> int:
    octets = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(octets, signed=True)


def read(source: Path | str, importer: Importer, met: Ids | None = None) -> Iterator[Imported | Issue]:
    """A case for every row of a file, or of `hub:owner/name[:config][:split]`, or an issue that tells why not.

    A second row of an id, also in another source that is read with the same `met`, is dropped if its text is the
    same. With another text it takes the id and a number, and an issue comes before the case that says so.
    """
    met = Ids() if met is None else met
    for line, row in _rows(source):
        try:
            if isinstance(row, BadRow):
                raise row
            case = _checked(importer(row))
            own = not (_DIGEST.fullmatch(case.id) and case.id not in row.values())
            if own and met.has(case):
                other = "" if met.has(case, answered=True) else " and another answer"
                raise BadRow("id", f"{case.id!r} was met before, with the same text{other}, at {met.where(case.id)}")
            if before := met.first(case, str(source), line):
                name = met.next(case.id)
                if own:
                    reason = f"{case.id!r} was met before, with another text, at {before}; here it is {name!r}"
                    yield Issue(file=str(source), line=line, field="id", reason=reason, action="changed")
                case = case.model_copy(update={"id": name})
                met.first(case, str(source), line)
        except (UserError, WorkError):
            raise
        except Exception as error:  # noqa: BLE001  an importer may be the user's own
            failed = f"the importer failed ({type(error).__name__}: {error})"
            bad = error if isinstance(error, BadRow) else BadRow("", failed)
            yield Issue(file=str(source), line=line, field=bad.field, reason=bad.reason, action="dropped")
        else:
            yield Imported(line, case)


def head(source: Path | str) -> list[Mapping[str, Any]]:
    """The first rows that can be read."""
    return list(islice((row for _, row in _rows(source) if not isinstance(row, BadRow)), SAMPLE))


def sniff(source: Path | str) -> str:
    """The name of the layout that a file is in.

    Raises:
        UserError: it is in none that is known.
    """
    try:
        return detect(head(source))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def importer_of(layout: str, source: Path | str) -> Importer:
    """Who reads the rows of a layout by that name."""
    if layout == "instruction":
        return instruction_importer(head(source))
    return ddxplus.importer(Path(source).parent) if layout == DDXPLUS else LAYOUTS[layout]


def _rows(source: Path | str) -> Iterator[tuple[int, Row]]:
    return hub.rows(source) if isinstance(source, str) and source.startswith(hub.PREFIX) else rows(Path(source))


def _checked(case: Any) -> Case:
    """What an importer gave, once it is a case with a text that can be written and read again."""
    if not isinstance(case, Case):
        raise BadRow("", f"the importer gave {type(case).__name__}, not a Case")
    if not case.text.strip():
        raise BadRow("text", "it is empty")
    if len(case.text) > LONGEST:
        raise BadRow("text", f"{len(case.text)} characters; a record has at most {LONGEST}")
    try:
        Case.model_validate_json(case.model_dump_json())
    except ValueError as error:  # nested too deeply; values that JSON has no words for
        raise BadRow("", f"it can't be kept as JSON ({error})") from error
    return case
