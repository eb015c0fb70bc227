"""What became of the rows of a user's files: the figures, a table for the terminal, a page."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise

from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.core.records import Case, Issue, Language
from preceptor.data.metadata import FIELDS
from preceptor.data.splits import family_key, member
from preceptor.report.summary import Words
from preceptor.report.templates import template

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+|(?<=: ).*|(?<=at ).*")
_EDGES = (0, 50, 100, 200, 300, 500, 1000, 2000, 5000, 20_000)
_RANGES = [*(f"{low:,}–{high - 1:,}" for low, high in pairwise(_EDGES)), f"{_EDGES[-1]:,} +"]
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
    dates: dict[str, tuple[str, str]]
    """Of a split whose cases have dates: the first and the last."""
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


class Tally:
    """Counts rows, issues and cases as they come, and keeps none of them."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        """Of each file; none for the textbook."""
        self.layouts: dict[str, str] = {}
        """Of each file."""
        self.dropped = 0
        """Rows that make no case."""
        self.first: Issue | None = None
        """The first of them."""
        self.near = 0
        self.boilerplate = 0.0
        self._kinds: dict[tuple[str, str, str], tuple[int, list[str]]] = {}
        self._splits: dict[str, Counter[str]] = {}
        self._dates: dict[str, tuple[str, str]] = {}
        self._texts: set[str] = set()
        self._leaks = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("gold", "characters", "language", *FIELDS)
        }

    def issue(self, issue: Issue) -> None:
        """Counts one with those that differ from it in particulars alone."""
        kind = issue.field, _PARTICULARS.sub("…", issue.reason), issue.action
        count, places = self._kinds.get(kind, (0, []))
        self._kinds[kind] = count + 1, places if len(places) == _SHOWN else [*places, f"{issue.file}:{issue.line}"]
        if issue.action == "dropped":
            self.dropped += 1
            self.first = self.first or issue

    def case(self, case: Case, splits: Collection[str]) -> None:
        """Counts a case and the splits that it is in."""
        for split in splits:
            self._splits.setdefault(split, Counter())[case.group] += 1
            if day := member(case).day:
                first, last = self._dates.get(split, (str(day), str(day)))
                self._dates[split] = min(first, str(day)), max(last, str(day))
        self._texts.add(family_key(case.text))
        self._leaks += bool(case.meta.get("leaks"))
        told = {
            "gold": case.gold_source or "none",
            "characters": _RANGES[bisect_right(_EDGES, len(case.text)) - 1],
            "language": case.language,
            **{name: str(case.meta.get(name, "–")) for name in FIELDS},
        }
        for name, value in told.items():
            self._counts[name][value] += 1

    def summary(self, splits: Iterable[str], redteam: int) -> Summary:
        """The figures; `splits` in the order in which they are shown, and how many rows are red-team items."""
        cases = self._counts["language"].total()
        gold, characters = self._counts["gold"], self._counts["characters"]
        kinds = sorted(self._kinds.items(), key=lambda item: -item[1][0])
        return Summary(
            rows=self.rows.total() or cases,
            cases=cases,
            dropped=self.dropped,
            sources=tuple(Source(name=name, layout=self.layouts[name], rows=n) for name, n in self.rows.items()),
            splits={split: self._splits.get(split, Counter()).total() for split in splits},
            families={split: len(self._splits.get(split, ())) for split in splits},
            dates=self._dates,
            repeated=cases - len(self._texts),
            near=self.near,
            leaks=self._leaks,
            boilerplate=self.boilerplate,
            redteam=redteam,
            gold=dict(gold),
            issues=tuple(
                Kind(field=field, reason=reason, action=action, count=count, places=tuple(places))
                for (field, reason, action), (count, places) in kinds
            ),
            distributions={
                "characters": {name: characters[name] for name in _RANGES if characters[name]},
                "language": dict(self._counts["language"]),
                **{name: dict(self._counts[name].most_common()) for name in FIELDS},
            },
        )


def table(summary: Summary) -> Table:
    """The splits, and what was found, for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "cases", "families", *["dates"] * bool(summary.dates)):
        shown.add_column(column, justify="right" if column else "left")
    for split, count in summary.splits.items():
        shown.add_row(split, f"{count:,}", f"{summary.families[split]:,}", " to ".join(summary.dates.get(split, ())))
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
