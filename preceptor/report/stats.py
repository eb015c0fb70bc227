"""What is in files of cases and answers: counts, lengths, sections, reasons, diseases; whatever layout they have."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Prediction, Row
from preceptor.data.files import Imported, head, importer_of, read, sniff
from preceptor.data.rows import BadRow, rows
from preceptor.data.sections import sections
from preceptor.tasks.diagnosis import parse

_NONE = "–"
_BARS = "▁▂▃▄▅▆▇█"
_BINS = 12


@dataclass
class _Tally:
    """What was counted in one file."""

    kind: str = _NONE
    why: str = ""
    """Why nothing of it was understood."""
    rows: int = 0
    bad: int = 0
    cases: list[int] = field(default_factory=list)
    """Characters of each, as are answers."""
    sections: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    quoted: list[int] = field(default_factory=list)
    """Characters of an answer's reasons together."""
    diseases: list[int] = field(default_factory=list)
    abstained: int = 0
    failed: int = 0


_Line = tuple[str, Callable[[_Tally], str]]
_LINES: tuple[_Line, ...] = (
    ("layout", lambda t: t.kind),
    ("rows", lambda t: f"{t.rows:,}"),
    ("not understood", lambda t: f"{t.bad:,}"),
    ("cases", lambda t: f"{len(t.cases):,}"),
    ("characters a case: mean", lambda t: _mean(t.cases, 0)),
    ("  median, 95 %, most", lambda t: _spread(t.cases)),
    ("  from none to most", lambda t: _histogram(t.cases)),
    ("sections a case", lambda t: _mean(t.sections)),
    ("answers", lambda t: f"{len(t.answers):,}"),
    ("characters an answer: mean", lambda t: _mean(t.answers, 0)),
    ("  median, 95 %, most", lambda t: _spread(t.answers)),
    ("  from none to most", lambda t: _histogram(t.answers)),
    ("reasons an answer", lambda t: _mean(t.reasons)),
    ("  from 0 on", lambda t: _counts(t.reasons)),
    ("characters of the reasons: mean", lambda t: _mean(t.quoted, 0)),
    ("diseases an answer", lambda t: _mean(t.diseases)),
    ("  from 0 on", lambda t: _counts(t.diseases)),
    ("abstained", lambda t: f"{t.abstained:,}"),
    ("failed or unread", lambda t: f"{t.failed:,}"),
)
_NARROWEST, _GAP = 12, 2


def tables(files: Iterable[Path], width: int) -> list[Table | str]:
    """One column a file, as many beside one another as `width` characters hold; then why a file wasn't understood.

    Raises:
        UserError: a file is missing, or can't be read.
    """
    found = list(files)
    tallies = [_tally(path) for path in found]
    columns = [[cell(tally) for _, cell in _LINES] for tally in tallies]
    names = _names(found)
    room = width - max(len(label) for label, _ in _LINES)
    shown: list[Table | str] = []
    for group in _groups([max(_NARROWEST, *map(len, column)) + _GAP for column in columns], room):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for place in group:
            widest = max(_NARROWEST, *map(len, columns[place]))
            table.add_column(names[place], justify="right", overflow="fold", min_width=widest)
        for (label, _), *cells in zip(_LINES, *(columns[place] for place in group), strict=True):
            table.add_row(label, *cells)
        shown.append(table)
    return shown + [tally.why for tally in tallies if tally.why]


def _names(files: Sequence[Path]) -> list[str]:
    """The files' names, with their folders where two are called the same."""
    times = Counter(path.name for path in files)
    return [path.name if times[path.name] == 1 else str(path) for path in files]


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Neighbours that fit into the room together; one that is too wide stands alone."""
    groups: list[list[int]] = []
    left = 0
    for place, wide in enumerate(widths):
        if not groups or wide > left:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= wide
    return groups


def _tally(path: Path) -> _Tally:
    if not path.is_file():
        raise UserError(f"{path}: no such file; name files of cases or answers")
    first = head(path)
    for kind, (record, count) in _OWN.items():
        if first and all(row.keys() >= _required(record) for row in first):
            return _own(path, kind, record, count)
    return _cases(path)


def _own(path: Path, kind: str, record: type[Prediction] | type[Row], count: Callable[[Any, _Tally], None]) -> _Tally:
    """Of a file that this project writes."""
    tally = _Tally(kind)
    for _, row in rows(path):
        tally.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            count(record.model_validate(row), tally)
        except (BadRow, ValidationError):
            tally.bad += 1
    return tally


def _cases(path: Path) -> _Tally:
    """Of a file of cases, in whatever layout; of any other its rows alone."""
    try:
        tally = _Tally(sniff(path))
    except UserError as error:
        number = sum(1 for _ in rows(path))
        return _Tally(why=str(error), rows=number, bad=number)
    for found in read(path, importer_of(tally.kind, path)):
        if isinstance(found, Imported):
            _case(found.case, tally)
        elif found.action == "dropped":
            tally.bad += 1
    tally.rows = tally.bad + len(tally.cases)
    return tally


def _case(case: Case, tally: _Tally) -> None:
    tally.cases.append(len(case.text))
    tally.sections.append(len(sections(case.text)))
    if isinstance(case.gold, Consultation):
        tally.answers.append(len(case.gold.think) + len(case.gold.answer))
    elif case.gold:
        _diagnosis(case.gold, "".join((*case.gold.diseases, *case.gold.reason)), tally)


def _prediction(prediction: Prediction, tally: _Tally) -> None:
    _diagnosis(prediction.output if isinstance(prediction.output, Diagnosis) else None, prediction.text, tally)


def _row(row: Row, tally: _Tally) -> None:
    tally.cases.append(sum(len(message.content) for message in row.messages))
    _diagnosis(parse(row.answer).output, row.answer, tally)


_OWN: Mapping[str, tuple[type[Prediction] | type[Row], Callable[[Any, _Tally], None]]] = {
    "predictions": (Prediction, _prediction),
    "training rows": (Row, _row),
}


def _required(record: type[Prediction] | type[Row]) -> set[str]:
    return {name for name, field in record.model_fields.items() if field.is_required()}


def _diagnosis(output: Diagnosis | None, said: str, tally: _Tally) -> None:
    tally.answers.append(len(said))
    if output is None:
        tally.failed += 1
        return
    tally.abstained += output.abstained
    tally.reasons.append(len(output.reason))
    tally.quoted.append(sum(map(len, output.reason)))
    tally.diseases.append(len(output.diseases))


def _spread(lengths: Sequence[int]) -> str:
    if not lengths:
        return _NONE
    median, most = np.percentile(lengths, [50, 95])
    return f"{median:,.0f}, {most:,.0f}, {max(lengths):,}"


def _mean(counts: Sequence[int], digits: int = 1) -> str:
    return f"{np.mean(counts):,.{digits}f}" if counts else _NONE


def _histogram(values: Sequence[int]) -> str:
    return _drawn(np.histogram(values, _BINS, (0, max(values)))[0].tolist()) if values and max(values) else _NONE


def _counts(values: Sequence[int]) -> str:
    return _drawn(np.bincount(values)[: 2 * _BINS].tolist()) if values else _NONE


def _drawn(counts: Sequence[int]) -> str:
    """A bar for each count; none at all is a blank."""
    most = max(counts)
    return "".join(_BARS[(len(_BARS) - 1) * count // most] if count else " " for count in counts)
