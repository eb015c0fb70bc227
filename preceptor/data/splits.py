"""Which split a case belongs to, such that no patient and no near copy stands on both sides.

A *unit* is what stays together: cases of one group, or of one text. Groups come from the file (the patient),
from the text, and from `joined`, which puts near copies into one. All of it works on what `member` keeps of a
case, so that files of millions fit into memory.
"""

import hashlib
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from itertools import accumulate, islice
from typing import Literal

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation
from preceptor.core.text import normalise
from preceptor.data.sections import sections
from preceptor.data.similar import Groups

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_MARKS = re.compile(r"[^\w+\-<>=.%/]+|(?<!\d)[.\-/]|[.\-/](?!\d)")
"""What doesn't tell texts apart. Signs of numbers do: (+), <3, 3.5."""
_SHOWN = 3
"""Ids that a line names of each split."""


def family_key(text: str) -> str:
    """The family of a text: the same for texts that differ in case, width, white space and punctuation alone."""
    plain = normalise(text)
    letters = _MARKS.sub("", plain) or plain
    return hashlib.sha256(letters.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Member:
    """What splits need to know of a case."""

    id: str
    group: str
    text: str
    """Its `family_key`."""
    day: date | None
    stratum: tuple[str, str]
    """Specialty and risk level."""


def member(case: Case) -> Member:
    """What splits need to know of `case`."""
    group, text = case.group, family_key(case.text)
    stratum = _stratum(str(case.meta.get("specialty", "")), str(case.meta.get("risk_level", "")))
    return Member(case.id, text if group == text else group, text, _day(case), stratum)


@cache
def _stratum(specialty: str, risk: str) -> tuple[str, str]:
    """One object for all members of a stratum."""
    return specialty, risk


def joined(cases: Sequence[Member], families: Sequence[int]) -> list[Member]:
    """The members with groups that hold near copies together, in the same order.

    Args:
        cases: in their groups so far.
        families: of each case a number, the same for near copies (`similar.families`).

    Returns:
        Cases of one group, one text or one family share a group. It goes by the least of the names that it
        takes in, a patient's before a text's.
    """
    links: list[Hashable] = list(families)
    groups = list(cases)
    for unit in _units(cases, links):
        keys = _keys(cases, unit)
        name = min((cases[place].group for place in unit), key=lambda group: (group in keys, group))
        for place in unit:
            if cases[place].group != name:
                groups[place] = replace(cases[place], group=name)
    return groups


def assign(
    cases: Sequence[Member],
    shares: Mapping[Split, float],
    by: Literal["family", "patient", "date"] = "family",
    seed: int = 0,
) -> list[Split]:
    """The split of each case. Units stay whole; the order of the cases changes nothing.

    By family or patient, units are dealt out evenly within each specialty and risk level, and a split
    has more than its share by less than the largest unit. By patient, every case must have one, that is a group
    which is no text's `family_key`. By date (`meta["date"]`), the earliest units go to train and the latest to
    test, whatever their strata. A unit counts as late as its latest case, so that train holds nothing from
    after the days that it is tested on.

    Raises:
        UserError: no share is positive, or cases lack the patient or the date.
    """
    whole = sum(shares.values())
    if whole <= 0 or min(shares.values()) < 0:
        raise UserError(
            f"shares: {dict(shares)} leaves no case a place; give train, validation or test a number above 0"
        )
    units = sorted(_units(cases), key=lambda unit: _digest(seed, min(cases[place].group for place in unit)))
    if by == "patient":
        _demand("patient", cases, [place for unit in units for place in _nameless(cases, unit)])
    portions = {split: shares.get(split, 0) / whole for split in SPLITS}
    if by == "date":
        places = _by_date(cases, units, portions)
    else:
        units.sort(key=lambda unit: _commonest(cases[place] for place in unit))
        places = _dealt(units, portions)
    found: dict[int, Split] = {}
    for unit, split in zip(units, places, strict=True):
        found.update(dict.fromkeys(unit, split))
    return [found[place] for place in range(len(cases))]


def benchmark(cases: Iterable[Case], number: int) -> list[str]:
    """The ids of the best `number` of the held-out cases, or of fewer if there aren't so many; sorted.

    Never one that states its answer (`meta["leaks"]`) and never two of a group; the specialties in turn. Best
    is gold with its reasons, then gold, then the record with the most sections filled; the rest is by lot.
    """
    best: dict[str, tuple[tuple[int, int, str], str, str]] = {}
    for case in cases:
        if not case.meta.get("leaks"):
            ranked = (_rank(case), case.id, str(case.meta.get("specialty", "")))
            best[case.group] = min(best.get(case.group, ranked), ranked)
    queues: defaultdict[str, list[str]] = defaultdict(list)
    for _, identity, specialty in sorted(best.values()):
        queues[specialty].append(identity)
    turns = sorted((turn, specialty) for specialty, queue in queues.items() for turn in range(len(queue)))
    return sorted(queues[specialty][turn] for turn, specialty in islice(turns, number))


def crossings(splits: Mapping[str, Sequence[Member]]) -> list[str]:
    """A line for every unit that stands in more than one split, naming ids; none is the proof that no unit does.

    A benchmark may share cases with validation and test, of which it is a selection. Leave out what may cross.
    """
    roles = [role for role, cases in splits.items() for _ in cases]
    cases = [case for cases in splits.values() for case in cases]
    lines = []
    for unit in _units(cases):
        ids: defaultdict[str, list[str]] = defaultdict(list)
        for place in unit:
            ids[roles[place]].append(cases[place].id)
        apart = ids.keys() - ({"benchmark"} if ids.keys() & {"validation", "test"} else set())
        if len(apart) > 1:
            told = ", ".join(f"{role} ({_told(names)})" for role, names in ids.items())
            lines.append(f"{min(cases[place].group for place in unit)}: {told}")
    return sorted(lines)


def _units(cases: Sequence[Member], links: Sequence[Hashable] | None = None) -> list[list[int]]:
    """The places of the cases, those together that share group, text or link."""
    groups = Groups(len(cases))
    shared: list[Iterable[Hashable]] = [(case.group for case in cases), (case.text for case in cases)]
    for keys in shared if links is None else [*shared, links]:
        first: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            groups.merge(first.setdefault(key, place), place)
    units: defaultdict[int, list[int]] = defaultdict(list)
    for place in range(len(cases)):
        units[groups.of(place)].append(place)
    return list(units.values())


def _keys(cases: Sequence[Member], unit: Iterable[int]) -> set[str]:
    return {cases[place].text for place in unit}


def _nameless(cases: Sequence[Member], unit: Sequence[int]) -> list[int]:
    """The cases of a unit whose group came from a text."""
    keys = _keys(cases, unit)
    return [place for place in unit if cases[place].group in keys]


def _dealt(units: Sequence[Sequence[int]], portions: Mapping[Split, float]) -> list[Split]:
    """The units in their order, each to the split that lacks most: so every stretch of them is shared out evenly."""
    lacks = dict.fromkeys(SPLITS, 0.0)
    places: list[Split] = []
    for unit in units:
        for split in SPLITS:
            lacks[split] += portions[split] * len(unit)
        chosen = max((split for split in SPLITS if portions[split]), key=lacks.__getitem__)
        lacks[chosen] -= len(unit)
        places.append(chosen)
    return places


def _by_date(cases: Sequence[Member], units: list[list[int]], portions: Mapping[Split, float]) -> list[Split]:
    """Sorts the units by date, and cuts where the shares say: a unit goes where its middle lies."""
    days = [case.day for case in cases]
    _demand("date", cases, [place for place, day in enumerate(days) if day is None])
    units.sort(key=lambda unit: max(day for place in unit if (day := days[place])))
    borders = list(accumulate(portions[split] * len(cases) for split in SPLITS))
    ends = accumulate(map(len, units))
    middles = [end - len(unit) / 2 for end, unit in zip(ends, units, strict=True)]
    return [SPLITS[bisect_left(borders, middle)] for middle in middles]


def _day(case: Case) -> date | None:
    try:
        return date.fromisoformat(str(case.meta.get("date", ""))[:10])
    except ValueError:
        return None


def _demand(name: str, cases: Sequence[Member], lacking: Sequence[int]) -> None:
    if lacking:
        ids = _told([cases[place].id for place in sorted(lacking)])
        raise UserError(
            f"split by {name}: {len(lacking)} of {len(cases)} cases have none ({ids}); "
            "give them one, take them out, or split by family"
        )


def _told(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _commonest(cases: Iterable[Member]) -> tuple[str, str]:
    """The stratum of most of a unit's cases."""
    counts = Counter(case.stratum for case in cases)
    return min(counts, key=lambda stratum: (-counts[stratum], stratum))


def _rank(case: Case) -> tuple[int, int, str]:
    gold = case.gold
    reasoned = bool(gold.think and gold.answer) if isinstance(gold, Consultation) else bool(gold and gold.reason)
    filled = {section.kind for section in sections(case.text) if section.body}
    return -(gold is not None) - reasoned, -len(filled), _digest(0, case.id)


def _digest(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).hexdigest()
