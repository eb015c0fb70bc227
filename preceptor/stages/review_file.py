"""The file in which a person decides about labels in doubt: a table for any spreadsheet, and what comes back of it.

What a spreadsheet would run, or take for a number or a date, gets a ' before it, which is taken off again.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Issue, Prediction
from preceptor.core.text import normalise
from preceptor.data.decode import LONGEST
from preceptor.data.rows import BadRow, rows
from preceptor.tasks import diagnosis
from preceptor.tasks.curation import Dropped, Graded, Rules, graded

REVIEWER = "reviewer"
"""Why a label is dropped that a person would not have."""
KEEP, DROP, EDIT = "keep", "drop", "edit"
VERDICTS = {KEEP: KEEP, DROP: DROP, EDIT: EDIT, "保留": KEEP, "删除": DROP, "修改": EDIT}
_LONGEST = 32_000
"""Characters of a cell that is written; a spreadsheet cuts it at `_CELL`, and what was cut is not what was edited."""
_CELL = 32_767
_DIGITS = 18
"""Of a sample's number."""
_HARMFUL = re.compile(
    r"['=+\-@\t\r\n＝＋－＠].*"  # the wide ones run too
    r"|(?!(?:0|[1-9]\d{0,10})$)[\d\s.,:/eE-]+"
    r"|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*[\s-]?\d+|true|false",
    re.IGNORECASE | re.DOTALL,
)


def guarded(text: str) -> str:
    """A cell that every spreadsheet takes for text."""
    return f"'{text}" if _HARMFUL.fullmatch(text) else text


def plain(cell: Any) -> str:
    """What was written into a cell, as it is read back from CSV or XLSX."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # as spreadsheets have whole numbers
    text = str(cell).replace("_x000D_", "").replace("\r\n", "\n").replace("\r", "\n")
    return text[1:] if text.startswith("'") and _HARMFUL.fullmatch(text[1:]) else text


def columns(rules: Rules) -> tuple[str, ...]:
    """The columns that hold the answer, for the person to edit."""
    answer = ("diseases", "reason") if rules.task == "diagnosis" else ("answer",)
    return (*(("think",) if rules.thinks else ()), *answer)


class Writer:
    """Writes the table, a label a row; UTF-8 with its mark, without which a spreadsheet garbles Chinese."""

    def __init__(self, path: Path, rules: Rules) -> None:
        self._columns = columns(rules)
        self._file = path.open("w", encoding="utf-8-sig", newline="")
        self._sheet = csv.writer(self._file)
        beside = ("agreement", "why", "verdict", "note")
        self._sheet.writerow(("case_id", "sample", "text", *self._columns, *beside))

    def write(self, case: Case, one: Graded, said: Mapping[str, str]) -> None:
        """Add a label in doubt, with what a person has written about it before."""
        cells = {**_cells(one), "verdict": "", "note": "", **said}
        agreement = "" if one.label.agreement is None else f"{one.label.agreement:.2f}"
        shown = (case.text, *(cells[name] for name in self._columns))
        told = ("; ".join(one.doubts), cells["verdict"], cells["note"])
        first, last = (tuple(guarded(text[:_LONGEST]) for text in part) for part in (shown, told))
        self._sheet.writerow((guarded(case.id), one.label.sample, *first, agreement, *last))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass(frozen=True)
class Verdict:
    """What a person wrote about one label."""

    file: str
    line: int
    cells: Mapping[str, str]

    @property
    def said(self) -> str:
        """The verdict as it was written; empty where there is none yet."""
        return normalise(self.cells["verdict"]).strip()


@dataclass
class Verdicts:
    """The verdicts of files, by case and sample, and what can't be used of them.

    Where several rows are about one label, the last that has a verdict counts.
    """

    rules: Rules
    files: list[str] = field(default_factory=list)
    given: defaultdict[tuple[str, int], list[Verdict]] = field(default_factory=lambda: defaultdict(list))
    issues: list[Issue] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by what came of them: kept, edited, dropped, refused (no rule may lift what it breaks), undecided."""
    _met: set[tuple[str, int]] = field(default_factory=set)

    def read(self, path: Path) -> None:
        """Read a file that a spreadsheet may have made into another kind or encoding.

        Raises:
            UserError: it lacks a column that the stage wrote.
        """
        self.files.append(str(path))
        wanted = ("case_id", "sample", *columns(self.rules), "verdict")
        before = csv.field_size_limit(LONGEST)  # by default a long cell breaks its row, and those after it
        try:
            for line, row in rows(path):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    named = {normalise(name): value for name, value in row.items()}
                    if absent := [name for name in wanted if name not in named]:
                        raise UserError(
                            f"{path}: no column {absent[0]!r} among {', '.join(named)[:200]}: "
                            "edit the review.csv that curate wrote, and keep its columns"
                        )
                    self._add(Verdict(str(path), line, {name: plain(named.get(name)) for name in (*wanted, "note")}))
                except BadRow as error:
                    self._tell(str(path), line, error.field, error.reason)
        finally:
            csv.field_size_limit(before)

    def _add(self, verdict: Verdict) -> None:
        for name, cell in verdict.cells.items():
            if len(cell) > _CELL:
                raise BadRow(name, f"{len(cell)} characters, where a cell holds {_CELL}: shorten it")
        case_id, sample = (verdict.cells[name].strip() for name in ("case_id", "sample"))
        if not sample.isdecimal() or len(sample) > _DIGITS:
            raise BadRow("sample", f"{sample[:40]!r} is no sample's number: leave it as it was written")
        given = self.given[case_id, int(sample)]
        if other := next((other for other in given if other.file == verdict.file and other.said), None):
            raise BadRow("case_id", f"the verdict on this label in line {other.line} stands")
        given.append(verdict)

    def follow(self, one: Graded, case: Case) -> Graded | Dropped:
        """What a label is once a person has decided; itself where none has."""
        given = self.given.get(_key(one), [])
        self._met.add(_key(one))
        for verdict in reversed(given):
            try:
                if verdict.said:
                    return self._followed(one, case, verdict)
                label = _edited(one, verdict.cells)
                if (label.output, label.thinking) != (one.answer, one.label.thinking):
                    raise BadRow("verdict", "empty, though the answer was changed: write edit")
            except BadRow as error:
                self._tell(verdict.file, verdict.line, error.field, error.reason)
                if verdict.said:
                    return one
        if given:
            self.counts["undecided"] += 1
        return one

    def _followed(self, one: Graded, case: Case, verdict: Verdict) -> Graded | Dropped:
        word = VERDICTS.get(verdict.said)
        if word is None:
            raise BadRow("verdict", f"{verdict.cells['verdict'][:40]!r} is none of {', '.join(VERDICTS)}")
        if word == DROP:
            self.counts["dropped"] += 1
            return one.dropped(REVIEWER, verdict.cells["note"])
        label = _edited(one, verdict.cells)
        told = graded(label, case, self.rules, reviewed=True)
        assert isinstance(told, Graded)  # as `one` is
        if isinstance(label.output, Diagnosis) and isinstance(told.answer, Diagnosis):
            for reason in (reason for reason in label.output.reason if reason not in told.answer.reason):
                lost = f"{reason[:100]!r} does not stand in the record: taken out"
                self._tell(verdict.file, verdict.line, "reason", lost, "changed")
        if told.fault:
            self.counts["refused"] += 1
            self._tell(verdict.file, verdict.line, "", f"not learned: {': '.join(told.fault)}")
        else:
            self.counts["kept" if label.output == one.answer else "edited"] += 1
        return replace(told, source=one.source)

    def written(self, one: Graded) -> Mapping[str, str]:
        """The cells that a person has written about a label, with the last note, to be shown again while it waits."""
        given = self.given.get(_key(one), [])
        cells = next((verdict.cells for verdict in reversed(given) if verdict.said), given[-1].cells if given else {})
        notes = (verdict.cells["note"] for verdict in reversed(given))
        return {**cells, "note": next(filter(str.strip, notes), "")}

    def tell_unmet(self) -> None:
        """Write down the verdicts on what is no label here."""
        for (case_id, sample), given in self.given.items():
            for verdict in given if (case_id, sample) not in self._met else ():
                if verdict.said:
                    why = f"no label {sample} of a case {case_id[:100]!r} can be learned"
                    self._tell(verdict.file, verdict.line, "case_id", why)
                else:
                    self.counts["undecided"] += 1

    def _tell(
        self, file: str, line: int, column: str, reason: str, action: Literal["dropped", "changed"] = "dropped"
    ) -> None:
        self.issues.append(Issue(file=file, line=line, field=column, reason=reason, action=action))


def _key(one: Graded) -> tuple[str, int]:
    return one.label.case_id.strip(), one.label.sample


def _cells(one: Graded) -> dict[str, str]:
    answer = one.answer
    if isinstance(answer, Consultation):
        return {"think": answer.think, "answer": answer.answer}
    return {"think": one.label.thinking, "diseases": "\n".join(answer.diseases), "reason": "\n".join(answer.reason)}


def _edited(one: Graded, cells: Mapping[str, str]) -> Prediction:
    """The label with the person's answer: what was not touched stays as it was, to the letter.

    Raises:
        BadRow: a cell can't be read.
    """
    before = _cells(one)
    said = {name: cells[name] for name in before if name in cells}
    touched = {name for name in said if _lines(said[name]) != _lines(before[name][:_LONGEST])}
    answer, thinking = one.answer, one.label.thinking
    if isinstance(answer, Consultation):
        if not said["answer"].strip():
            raise BadRow("answer", "it is empty; to leave the label out, write drop")
        fields = {name: said[name].strip() for name in touched}
        return one.label.model_copy(update={"output": answer.model_copy(update=fields)})
    if "think" in touched:
        thinking = said["think"].strip()
    if touched & {"diseases", "reason"}:
        answer = _diagnosis(said, answer, touched)
    return one.label.model_copy(update={"output": answer, "thinking": thinking})


def _diagnosis(said: Mapping[str, str], before: Diagnosis, touched: set[str]) -> Diagnosis:
    given = {name: _listed(said[name]) for name in ("diseases", "reason")}
    if not given["diseases"] and given["reason"]:
        raise BadRow("diseases", "empty, and there are reasons; name a disease, or empty both: none can be named")
    parsed = diagnosis.parse(json.dumps(given, ensure_ascii=False)).output
    if parsed is None:
        raise BadRow("diseases", f"{said['diseases'][:40]!r} names no disease that can be read")
    if parsed.abstained:
        return Diagnosis()
    return Diagnosis(
        diseases=parsed.diseases if "diseases" in touched else before.diseases,
        reason=parsed.reason if "reason" in touched else before.reason,
    )


def _listed(cell: str) -> str | list[str]:
    """A line is an item, whatever separators the record's own words have; a single one may be a list."""
    lines = _lines(cell)
    return lines if len(lines) > 1 else "".join(lines)


def _lines(cell: str) -> list[str]:
    return [line.strip() for line in cell.splitlines() if line.strip()]
