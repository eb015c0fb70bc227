"""Evaluations beside one another on the cases that all of them measured: paired, so that chance is shared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.core.errors import UserError
from preceptor.core.statistics import Estimate, estimate
from preceptor.report.grades import AGREEMENT, CONSULT, GRADES
from preceptor.report.summary import UNKNOWN, percent

METRICS = ("parsed", *GRADES, *AGREEMENT, *CONSULT)
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
