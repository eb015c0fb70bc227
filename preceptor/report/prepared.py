"""What became of the rows of a user's files: the figures, a table for the terminal, a page."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.core.records import Case, Issue, Language
from preceptor.data.metadata import FIELDS
from preceptor.data.splits import family_key
from preceptor.report.summary import Words
from preceptor.report.templates import template

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|(?<=: ).*|(?<=at ).*")
_EDGES = (0, 50, 100, 200, 300, 500, 1000, 2000, 5000, 20_000)
_SHOWN = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Source(_Frozen):
    """One file."""

    name: str
    layout: str
    rows: int


class Kind(_Frozen):
    """Issues of one kind, and the first places where it was met."""

    field: str
    reason: str
    action: str
    count: int
    places: tuple[str, ...]


class Summary(_Frozen):
    """All that the page says."""

    rows: int
    cases: int
    dropped: int
    sources: tuple[Source, ...]
    splits: dict[str, int]
    families: dict[str, int]
    """Groups of a split: patients, or texts with their near copies."""
    repeated: int
    """Cases whose text another one before it has, but for case, width and white space."""
    near: int
    """Other texts that are near copies of an earlier one."""
    leaks: int
    """Cases whose text states the answer."""
    boilerplate: float
    """Share of the characters that stands in many records alike."""
    redteam: int
    """Rows of the files that are red-team items, and so in no split."""
    gold: dict[str, int]
    issues: tuple[Kind, ...]
    distributions: dict[str, dict[str, int]]
    """Of cases: characters in ranges, language, and the metadata's fields."""


def summarise(
    splits: Mapping[str, Sequence[Case]],
    redteam: Sequence[Case],
    issues: Iterable[Issue],
    rows: Mapping[str, int],
    layouts: Mapping[str, str],
    *,
    boilerplate: float,
    near: int,
) -> Summary:
    """The figures. `rows` and `layouts` go by file, and are empty for the textbook."""
    every = [case for split, cases in splits.items() if split != "benchmark" for case in cases]
    texts = {family_key(case.text) for case in every}
    found = list(issues)
    return Summary(
        rows=sum(rows.values()) or len(every),
        cases=len(every),
        dropped=sum(issue.action == "dropped" for issue in found),
        sources=tuple(Source(name=name, layout=layouts[name], rows=count) for name, count in rows.items()),
        splits={split: len(cases) for split, cases in splits.items()},
        families={split: len({case.group for case in cases}) for split, cases in splits.items()},
        repeated=len(every) - len(texts),
        near=near,
        leaks=sum(bool(case.meta.get("leaks")) for case in every),
        boilerplate=boilerplate,
        redteam=len(redteam),
        gold=dict(Counter(case.gold_source or "none" for case in every)),
        issues=_kinds(found),
        distributions={
            "characters": _histogram([len(case.text) for case in every]),
            "language": dict(Counter(case.language for case in every)),
            **{name: dict(Counter(str(case.meta.get(name, "–")) for case in every).most_common()) for name in FIELDS},
        },
    )


def _kinds(issues: Iterable[Issue]) -> tuple[Kind, ...]:
    """Issues that differ in particulars alone, together; the commonest first."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for issue in issues:
        kind = issue.field, _PARTICULARS.sub("…", issue.reason), issue.action
        places.setdefault(kind, []).append(f"{issue.file}:{issue.line}")
    return tuple(
        Kind(field=field, reason=reason, action=action, count=len(where), places=tuple(where[:_SHOWN]))
        for (field, reason, action), where in sorted(places.items(), key=lambda item: -len(item[1]))
    )


def _histogram(lengths: Sequence[int]) -> dict[str, int]:
    counts, _ = np.histogram(lengths, [*_EDGES, np.inf])
    names = [f"{low:,}–{high - 1:,}" for low, high in pairwise(_EDGES)] + [f"{_EDGES[-1]:,} +"]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def table(summary: Summary) -> Table:
    """The splits, and what was found, for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "cases", "families"):
        shown.add_column(column, justify="right" if column else "left")
    for split, count in summary.splits.items():
        shown.add_row(split, f"{count:,}", f"{summary.families[split]:,}")
    shown.add_section()
    found = {
        "rows read": summary.rows,
        "rows dropped": summary.dropped,
        "repeated texts": summary.repeated,
        "near copies": summary.near,
        "records that state the answer": summary.leaks,
        "red-team rows set aside": summary.redteam,
    }
    for name, count in found.items():
        shown.add_row(name, f"{count:,}", "")
    shown.add_row("boilerplate", f"{summary.boilerplate:.0%}", "")
    return shown


def render(summary: Summary, title: str, language: Language) -> str:
    """The page: one file, nothing from elsewhere, all data escaped."""
    return template("prepared.html").render(summary=summary, title=title, words=Words(language))
