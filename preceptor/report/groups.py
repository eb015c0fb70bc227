"""Which kinds of cases a model is good at: the groups that every case belongs to, for figures of their own."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from preceptor.clinical.textbook import reader
from preceptor.core.records import Case

BANDS = (18, 40, 65)
"""Years at which an age band begins."""
AXES = ("language", "sex", "age", "specialty", "severity", "length")
_LEAST = 5
"""Cases that a group needs for a figure; of smaller ones the interval would say nothing."""
_MOST = 12
"""Groups of an axis that are told, the largest first."""


def groups(cases: Mapping[str, Case]) -> dict[tuple[str, str], list[str]]:
    """By axis and group the ids of its cases; an axis of one group alone is left out, for it tells nothing."""
    edges = _thirds([len(case.text) for case in cases.values()])
    of: dict[str, Callable[[Case], str | None]] = {
        "language": lambda case: case.language,
        "sex": lambda case: reader.sex(_said(case, "sex") or "") or reader.sex(case.text),
        "age": _band,
        "specialty": lambda case: _said(case, "specialty"),
        "severity": lambda case: _said(case, "severity") or _said(case, "risk_level"),
        "length": lambda case: _span(len(case.text), edges),
    }
    found: dict[tuple[str, str], list[str]] = {}
    for axis in AXES:
        held = {identity: group for identity, case in cases.items() if (group := of[axis](case))}
        kept = [group for group, n in Counter(held.values()).most_common(_MOST) if n >= _LEAST]
        if len(kept) > 1:
            members: dict[str, list[str]] = {group: [] for group in sorted(kept, key=_place)}
            for identity, group in held.items():
                if group in members:
                    members[group].append(identity)
            found |= {(axis, group): ids for group, ids in members.items()}
    return found


def _said(case: Case, field: str) -> str | None:
    value = case.meta.get(field)
    return str(value) if isinstance(value, str | int) and str(value) else None


def _band(case: Case) -> str | None:
    stated = case.meta.get("age")
    age = stated if isinstance(stated, int) else reader.age(case.text)
    if age is None:
        return None
    at = bisect_left(BANDS, age + 1)
    return f"{BANDS[at - 1] if at else 0}–{BANDS[at] - 1}" if at < len(BANDS) else f"{BANDS[-1]}+"


def _thirds(lengths: list[int]) -> list[int]:
    """The characters at which the middle and the longest third of the records begin."""
    return [int(edge) for edge in np.quantile(lengths, [1 / 3, 2 / 3])] if lengths else []


def _span(length: int, edges: list[int]) -> str:
    if length <= edges[0]:
        return f"≤{edges[0]}"
    return f"{edges[0] + 1}–{edges[1]}" if length <= edges[1] else f">{edges[1]}"


def _place(group: str) -> tuple[int, str]:
    """Numbers in their order, then names in theirs."""
    digits = "".join(mark for mark in group.split("–", maxsplit=1)[0] if mark.isdigit())
    order = {"low": 0, "medium": 1, "high": 2, "critical": 3}.get(group, 0)
    return (int(digits) + group.startswith(">") if digits else order), group
