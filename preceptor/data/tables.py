"""Tables, or any flat rows: which column is what."""

import difflib
import re
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from preceptor.clinical.textbook.book import load
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, Language
from preceptor.data.layouts import Importer, case_of, diagnosis_of, language_of, missing
from preceptor.data.rows import BadRow

_CODE = re.compile(r"(?<![A-Za-z0-9])([A-TV-Za-tv-z]\d[0-9A-Za-z](?:\.?[0-9A-Za-z]{1,7})?[*+†]?)(?![A-Za-z0-9]|/\d)")
_DATE = re.compile(
    r"(?:(?P<y>(?:19|20)\d\d)(?:[-/.年](?P<m>\d{1,2})[-/.月](?P<d>\d{1,2})日?|(?P<mm>\d\d)(?P<dd>\d\d))"
    r"|(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>(?:19|20)\d\d))(?:[T ].*)?"
)
_PARTS = (("y", "y", "year"), ("m", "mm", "month"), ("d", "dd", "day"))
_SERIALS = range(10_000, 80_000)
"""Days since the end of 1899 that a spreadsheet may mean by a number: 1927 to 2119."""


class Columns(BaseModel):
    """Which columns of a table hold what. Those that aren't named are kept in `meta`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    text: str | None = None
    """The record as a whole."""
    sections: dict[str, str] = Field(default_factory=dict)
    """Or its sections, label -> column, written as `label: value` lines in this order."""
    diseases: str | None = None
    """Gold: names, parted by number, semicolon, |, 、 or line, or by comma where nothing else parts them."""
    icd: tuple[str, ...] = ()
    """ICD-10 codes: gold where no column has names, by the textbook's name where it knows one."""
    patient: str | None = None
    """Cases of one patient never part."""
    date: str | None = None
    language: Language | None = None
    """Of all rows; by default each text speaks for itself."""

    @field_validator("icd", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_text(self) -> "Columns":
        if bool(self.text) == bool(self.sections):
            given = "both are named" if self.text else "neither is named"
            raise ValueError(f"text is the record's column, or sections are its parts' (label: column): {given}")
        return self

    def importer(self, sample: Sequence[Mapping[str, Any]] = ()) -> Importer:
        """Reads rows by these columns. `sample` are the first rows, in which each column must be found.

        Raises:
            UserError: a column is in none of them.
        """
        there = sorted({key for row in sample for key in row})
        for column in self._named() if sample else ():
            if column not in there:
                close = difflib.get_close_matches(column, there, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(there)}"
                raise UserError(f"columns: the file has no column {column!r}; {hint}")
        return self._case

    def _named(self) -> list[str]:
        one = (self.id, self.text, self.diseases, self.patient, self.date)
        return [name for name in (*one, *self.sections.values(), *self.icd) if name]

    def _case(self, row: Mapping[str, Any]) -> Case:
        if self.text:
            text = _said(row, self.text)
        else:
            parts = {label: _said(row, column) for label, column in self.sections.items()}
            text = "\n".join(f"{label}: {said}" for label, said in parts.items()) if any(parts.values()) else ""
        if not text:
            raise BadRow(self.text or "text", "it is empty")
        fields: dict[str, Any] = {"language": self.language or language_of(text), "meta": {}}
        if self.patient and (patient := _said(row, self.patient)):
            fields["group"] = fields["meta"]["patient"] = patient
        if self.date and (given := _said(row, self.date)):
            fields["meta"]["date"] = iso_date(given) or given
        gold = diagnosis_of(self.diseases, _said(row, self.diseases)) if self.diseases else None
        if codes := [code for column in self.icd for code in _codes(column, _said(row, column))]:
            fields["meta"]["icd"] = codes
            if gold is None:
                gold = Diagnosis(diseases=tuple(dict.fromkeys(name_of(code, fields["language"]) for code in codes)))
                fields["gold_source"] = "code"
        if "id" in row and self.id != "id":
            fields["meta"]["id"] = row["id"]
        identified = {**row, "id": row.get(self.id) if self.id else None}
        return case_of(identified, "table", text, self._named(), gold, **fields)


def _said(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(column, "the row has no such column")
    value = row[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as spreadsheets have whole numbers
    return "" if value is None or missing(value) else str(value).strip()


def _codes(column: str, said: str) -> list[str]:
    codes = [code.upper() for code in _CODE.findall(said)]
    if said and not codes:
        raise BadRow(column, f"no ICD-10 code in {said[:40]!r}")
    return codes


@cache
def name_of(code: str, language: Language) -> str:
    """The textbook's name of a code, or of the code that it refines (I10.x00x002 is an I10); else the code."""
    plain = re.sub(r"\W", "", code)
    book = {disease.icd10.replace(".", ""): disease for disease in load().diseases.values()}
    known = max((mine for mine in book if plain.startswith(mine)), key=len, default=None)
    return code if known is None else book[known].zh if language == "zh" else book[known].en


def iso_date(given: str) -> str | None:
    """A date as YYYY-MM-DD: from 2024-01-31, 2024/1/31, 20240131, 2024年1月31日, 31.01.2024 or a day's number.

    None if it is no such date: 1/2/2024 may be either of two days.
    """
    try:
        if found := _DATE.fullmatch(given):
            year, month, day = (found[a] or found[b] or found[c] for a, b, c in _PARTS)
            return date(int(year), int(month), int(day)).isoformat()
        if re.fullmatch(r"\d{5}(\.\d+)?", given) and int(float(given)) in _SERIALS:
            return (date(1899, 12, 30) + timedelta(days=int(float(given)))).isoformat()
    except ValueError:
        pass
    return None
