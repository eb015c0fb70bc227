"""Evaluations beside one another: paired on the cases that all of them measured, so that chance is shared.

Many at once, or of different test sets, stand in lines: each on its own cases, held against the first of its test set.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from preceptor.core.errors import UserError
from preceptor.core.records import Language
from preceptor.core.statistics import Estimate, estimate
from preceptor.report.grades import AGREEMENT, CONSULT, GRADES
from preceptor.report.summary import UNKNOWN, Words, percent

SCORE = "score"
"""The grader's value of an answer, whatever the task."""
METRICS = ("parsed", SCORE, *GRADES, *AGREEMENT, *CONSULT)
_TELLING = tuple(
    dict.fromkeys(
        (SCORE, *GRADES, *AGREEMENT, "urgent_recall", "severe_miss", "over_triage", "risky_prescription", *METRICS)
    )
)
_WIDEST = 10_000
_FEW = 4
RIGHT = ("top1", "agreement_top1")
"""What makes an answer right or wrong: the first of them that is known."""


@dataclass(frozen=True)
class Side:
    """One model of one evaluation."""

    name: str
    scores: Mapping[str, Mapping[str, float]]
    """By case and metric; of several samples their mean. What is unknown is absent."""


def table(sides: Sequence[Side]) -> Table:
    """A line for each metric: each side's value, then how far each differs from the first, with 95 % intervals.

    The sides go by letters: A is the first. A metric is measured on the cases in which every side has it, of those
    that have it anywhere.

    Raises:
        UserError: no case was measured on all sides.
    """
    shared = _shared(sides)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    letters = ascii_uppercase[: len(sides)]
    for column in ("", "cases", *letters, *(f"{letter} − A" for letter in letters[1:])):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for metric in METRICS:
        having = [any(metric in one.scores[case] for case in shared) for one in sides]
        own = [one for one, has in zip(sides, having, strict=True) if has]
        cases = [case for case in shared if own and all(metric in one.scores[case] for one in own)]
        if not cases:
            continue
        values = [np.array([one.scores[case][metric] for case in cases]) if one in own else None for one in sides]
        gains = (None if row is None or values[0] is None else estimate(row - values[0]) for row in values[1:])
        shown.add_row(metric, f"{len(cases):,}", *map(_figure, values), *map(_gain, gains))
    return shown


def lines(sides: Sequence[Side], language: Language, width: int) -> Table:
    """A line for each side: its cases and figures; bold is what differs, beyond chance, from the first of its test set.

    Sides that share a case are of one test set. A line between two sets tells them apart. Of the figures those are
    shown that fit into `width` characters, the most telling first.
    """
    known = [metric for metric in _TELLING if any(metric in parts for one in sides for parts in one.scores.values())]
    groups = _test_sets(sides)
    cells = {one.name: [_cell(group[0], one, metric) for metric in known] for group in groups for one in group}
    headers = [Words(language)(metric) for metric in known]

    def first(count: int) -> Table:
        shown = Table("", Column("cases", justify="right"), box=SIMPLE_HEAD, pad_edge=False)
        for header in headers[:count]:
            shown.add_column(header, justify="right")
        for group in groups:
            for one in group:
                row = cells[one.name][:count]
                shown.add_row(Text(one.name), f"{len(one.scores):,}", *row, end_section=one is group[-1])
        return shown

    room = Console(width=_WIDEST)
    fitting = (count for count in range(len(known), 1, -1) if room.measure(first(count)).maximum <= width)
    return first(next(fitting, 1))


def are_few(sides: Sequence[Side]) -> bool:
    """Whether `table` can show them: no more than four, with cases that all measured."""
    return len(sides) <= _FEW and len(_test_sets(sides)) == 1


def _test_sets(sides: Iterable[Side]) -> list[list[Side]]:
    groups: list[list[Side]] = []
    for one in sides:
        mine = next((group for group in groups if one.scores.keys() & group[0].scores.keys()), None)
        if mine is None:
            groups.append([one])
        else:
            mine.append(one)
    return groups


def _cell(first: Side, one: Side, metric: str) -> Text:
    values = [parts[metric] for parts in one.scores.values() if metric in parts]
    both = [case for case in one.scores if metric in one.scores[case] and metric in first.scores.get(case, {})]
    shown = _figure(np.array(values) if values else None)
    if one is not first and both:
        gain = estimate(np.array([one.scores[case][metric] - first.scores[case][metric] for case in both]))
        if gain.low > 0 or gain.high < 0:
            shown.stylize("bold", 0, len(shown.plain.partition("\n")[0]))
    return shown


def changes(first: Side, other: Side) -> dict[str, tuple[bool, bool]]:
    """The cases whose first diagnosis is right on one side alone: whether it is right on each."""
    found = {}
    for case in _shared((first, other)):
        known = [name for name in RIGHT if name in first.scores[case] and name in other.scores[case]]
        if known:
            before, after = (one.scores[case][known[0]] > 0.5 for one in (first, other))  # noqa: PLR2004  more than half
            if before != after:
                found[case] = before, after
    return found


def told(sides: Sequence[Side], shown: int = 10) -> str:
    """Which letter is which, and what changed: how many cases each way against the first, and some of them."""
    lines = [f"{letter} = {one.name}" for letter, one in zip(ascii_uppercase, sides, strict=False)]
    for letter, other in zip(ascii_uppercase[1:], sides[1:], strict=False):
        found = changes(sides[0], other)
        for right, wrong in ((letter, "A"), ("A", letter)):
            cases = [case for case, (_, after) in found.items() if after == (right == letter)]
            lines.append(
                f"{right} right, {wrong} wrong: {len(cases):,} case{'s' * (len(cases) != 1)}{_listed(cases, shown)}"
            )
    return "\n".join(lines)


def _listed(cases: Sequence[str], shown: int) -> str:
    more = len(cases) - shown
    return f" ({', '.join(cases[:shown])}{f' and {more:,} more' if more > 0 else ''})" if cases else ""


def _shared(sides: Iterable[Side]) -> list[str]:
    first, *others = sides
    shared = [case for case in first.scores if all(case in one.scores for one in others)]
    if not shared:
        names = ", ".join(one.name for one in (first, *others))
        raise UserError(f"{names}: no case was measured on all of them; compare evaluations of the same test set")
    return shared


def _figure(values: NDArray[np.float64] | None) -> Text:
    if values is None:
        return Text(UNKNOWN, style="dim")
    figure = estimate(values)
    return Text.assemble(percent(figure.value), "\n", (f"{100 * figure.low:.0f}–{100 * figure.high:.0f}", "dim"))


def _gain(figure: Estimate | None) -> Text:
    if figure is None:
        return Text(UNKNOWN, style="dim")
    sure = figure.low > 0 or figure.high < 0
    interval = f"{100 * figure.low:+.0f} … {100 * figure.high:+.0f}"
    return Text.assemble((f"{100 * figure.value:+.1f}", "bold" if sure else ""), "\n", (interval, "dim"))
