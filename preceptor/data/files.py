"""Raw files to cases, one row at a time: a bad row stops nothing and is never silent."""

import hashlib
import re
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
    """The ids that were met, where and with what text, in about 200 bytes each."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._texts: set[int] = set()
        self._sources: list[str] = []
        self._again: Counter[str] = Counter()

    def first(self, case: Case, source: str, line: int) -> str | None:
        """Where the id was met before; None, and it is remembered, if it wasn't."""
        digest = _digest(case.id)
        self._texts |= {_digest(f"{case.id} {case.text}"), _digest(f"{case.id} {case.text} {case.gold}")}
        if digest in self._places:
            number, where = divmod(self._places[digest], 1 << 40)
            return f"{self._sources[number]}:{where}"
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        self._places[digest] = (len(self._sources) - 1 << 40) + line
        return None

    def has(self, case: Case) -> bool:
        """Whether the id was met with this very text."""
        return _digest(f"{case.id} {case.text}") in self._texts

    def said(self, case: Case) -> bool:
        """Whether it was met with this very text and answer."""
        return _digest(f"{case.id} {case.text} {case.gold}") in self._texts

    def next(self, identity: str) -> str:
        """The id of one more row that has another's."""
        self._again[identity] += 1
        name = f"{identity}-{self._again[identity] + 1}"
        return self.next(identity) if _digest(name) in self._places else name


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


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
                answered = "" if met.said(case) else " and another answer"
                where = met.first(case, "", 0)
                raise BadRow("id", f"{case.id!r} was met before, with the same text{answered}, at {where}")
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
