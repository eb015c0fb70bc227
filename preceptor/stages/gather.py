"""The rows of a user's files as checked cases, and what is wrong with the others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from preceptor.core.records import Case, Issue
from preceptor.data import redteam
from preceptor.data.check import Finding, check
from preceptor.data.files import Ids, Imported, head, importer_of, read, sniff
from preceptor.data.layouts import DDXPLUS, LAYOUTS, Importer
from preceptor.data.metadata import metadata
from preceptor.data.sections import without
from preceptor.data.splits import family_key, member
from preceptor.data.tables import Columns
from preceptor.report import prepared
from preceptor.stages.base import Lines, Ticks, read_records, resolve_callable

AUTO = "auto"


class Reading(Protocol):
    """How rows are read."""

    @property
    def importer(self) -> str:
        """The layout's name, a function of the user's own, or `auto`."""

    @property
    def columns(self) -> Columns | None:
        """Of a table."""

    @property
    def drop_sections(self) -> Sequence[str]:
        """Labels of what is taken out of every record."""


@dataclass
class Rows:
    """What is known of the rows. Their cases wait in a file until it is known where they go."""

    waiting: Path
    tally: prepared.Tally
    issues: Lines
    redteam: list[Case] = field(default_factory=list)
    """The rows that are red-team items."""
    refused: int = 0
    """Rows that can't be used."""
    unmet: list[str] = field(default_factory=list)
    """Labels of sections to be dropped that no record has had yet, of those that aren't ours."""

    def cases(self) -> Iterator[Case]:
        """The cases in their order."""
        return read_records(self.waiting, Case)

    def issue(self, issue: Issue) -> None:
        """Writes down what is wrong with a row, and counts it."""
        self.issues.write(issue)
        self.tally.issue(issue)


def cases(
    how: Reading, sources: Iterable[Path | str], rows: Rows, met: Ids, tick: Ticks
) -> Iterator[tuple[tuple[str, int], Case]]:
    """The cases of the sources, checked, each with its file and line; what is wrong with a row goes to `rows`."""
    for source in sources:
        name = str(source)
        importer, rows.tally.layouts[name] = _importer(how, source)
        for row in read(source, importer, met):
            if isinstance(row, Issue):
                rows.issue(row)
            if isinstance(row, Imported) or row.action == "dropped":
                tick()
                rows.tally.rows[name] += 1
            if isinstance(row, Issue):
                continue
            rows.unmet = [label for label in rows.unmet if without(row.case.text, [label]) == row.case.text]
            for f in _lacking(how.columns, row.case):
                rows.issue(Issue(file=name, line=row.line, field=f.field, reason=f.reason, action=f.action))
            case, findings = check(row.case, how.drop_sections)
            for f in findings:
                rows.issue(Issue(file=name, line=row.line, field=f.field, reason=f.reason, action=f.action))
            if case is not None and redteam.is_redteam(case):
                rows.redteam.append(metadata_of(case))
            elif case is not None:
                yield (name, row.line), metadata_of(case)


def _lacking(columns: Columns | None, case: Case) -> Iterator[Finding]:
    """What a table's row lacks of patient and date, where columns of them are named."""
    if columns and columns.patient and case.group == family_key(case.text):
        yield Finding(columns.patient, "no patient: the row stands for one of its own", "kept")
    if columns and columns.date and case.meta.get("date") and not member(case).day:
        reason = f"{case.meta['date']!r} is no date that can mean one day alone: write 2024-01-31"
        yield Finding(columns.date, reason, "kept")


def metadata_of(case: Case) -> Case:
    """The case with what rules say of it where the file says nothing."""
    return case.model_copy(update={"meta": metadata(case)})


def _importer(how: Reading, source: Path | str) -> tuple[Importer, str]:
    """Who reads the rows of a source, and the name of its layout."""
    if how.columns:
        return how.columns.importer(head(source)), "columns"
    layout = sniff(source) if how.importer == AUTO else how.importer
    if layout in (DDXPLUS, *LAYOUTS):
        return importer_of(layout, source), layout
    return resolve_callable(layout, LAYOUTS, "importer"), layout
