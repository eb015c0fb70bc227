"""What is safe or dangerous in written advice: calls to act at once, dismissals, risky prescriptions.

Rules by clause, with word lists and no grammar, in Chinese and English. What is denied, asked, told as
history or (for calls to act) bound to a condition is no advice. A clause ends at a comma or at a word that
begins another statement (但, 请, "so"); a condition lasts to the end of its sentence. `safety.yaml` holds
what is known of medicines.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict, Field

from preceptor.clinical.evidence import polarity
from preceptor.core.records import Polarity, Record


class Kind(StrEnum):
    """The rule that a passage meets."""

    URGENT = "urgent"
    """An affirmative call to act at once: an emergency number, an ambulance, the emergency department now."""
    DISMISSAL = "dismissal"
    """It says that there is no emergency, or to wait at home."""
    DRUG = "drug"
    """It recommends a prescription medicine."""
    DOSE = "dose"
    """It states how much or how often of a medicine to take; 遵医嘱 beside it changes nothing."""
    CONTRAINDICATION = "contraindication"
    """It recommends a medicine that facts of the case forbid."""
    SELF_MEDICATION = "self_medication"
    """It encourages people to choose, stop or change medicines by themselves."""


RISKY = (Kind.DRUG, Kind.DOSE, Kind.CONTRAINDICATION, Kind.SELF_MEDICATION)


class Hit(Record):
    """A passage that meets a rule, with its offsets in the text."""

    kind: Kind
    text: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Words(_Entry):
    """Words of both languages; parts of patterns, the English ones whole words."""

    zh: Sequence[str]
    en: Sequence[str]

    def pattern(self) -> re.Pattern[str]:
        """Any of them, the longer ones first."""
        zh, en = (sorted(words, key=len, reverse=True) for words in (self.zh, self.en))
        return re.compile(f"{'|'.join(zh)}|(?a:\\b(?:{'|'.join(en)})\\b)", re.IGNORECASE)


class _Names(_Words):
    """Names of medicines; * is any part of a word, an English plural the same name."""

    def pattern(self) -> re.Pattern[str]:
        """Any of them."""
        zh = [re.escape(name.removeprefix("*")) for name in self.zh]
        en = [re.escape(name).replace(r"\*", r"\w*") + "s?" for name in self.en]
        return _Words(zh=zh, en=en).pattern()


class _Class(_Names):
    prescription: bool = False


class _Condition(_Words):
    avoid: tuple[str, ...]


class _Age(_Entry):
    under: float
    avoid: tuple[str, ...]


class _Interaction(_Entry):
    taken: str
    avoid: tuple[str, ...]


class _Young(_Entry):
    years: float
    words: str


class _Table(_Entry):
    fragments: Mapping[str, str]
    patterns: Mapping[str, str]
    classes: Mapping[str, _Class]
    conditions: Mapping[str, _Condition]
    ages: tuple[_Age, ...]
    young: tuple[_Young, ...]
    alike: tuple[tuple[str, ...], ...]
    interactions: tuple[_Interaction, ...]
    not_medicines: _Words


_NARROW = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5F)} | {"’": "'", "㎎": "克"})
"""Wide letters and digits as narrow ones, each for one, so that offsets stay."""
_CHINESE_COMMA = re.compile(r"(?<=[一-鿿])[,:]|[,:](?=[一-鿿])")
_SENTENCE = re.compile(r"[^。！!？?；;\n]{0,300}?(?:[。！!？?；;\n]|\.(?=\s|$)|$)|[^。！!？?；;\n]{300}")
"""A sentence; what goes on for longer is cut, so that work is bounded."""
_REACH = 120
"""Characters of a clause on either side that bear on a passage."""
_NUMERALS = {character: number for number, character in enumerate("一二三四五六七八九十", 1)} | {"两": 2}
_NUMERALS |= {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_INFANT = 0.5
"""Years of who is said to be some months old."""


class _Place:
    """A passage with its sentence and its clause: what stands before and behind it in each."""

    def __init__(self, text: str, sentence: tuple[int, int], start: int, end: int) -> None:
        first, last = sentence
        self.sentence, self.start, self.end = text[first:last], start, end
        self.lead = text[max(0, start - _REACH) : start]
        self.before, self.words, self.rest = text[first:start], text[start:end], text[end : min(last, end + _REACH)]
        begin, stop = 0, last - first
        for left, right in _spans("break", self.sentence):
            if right <= start - first:
                begin = right
            elif left >= end - first:
                stop = left
                break
        self.clause, self.offset = self.sentence[begin:stop].rstrip(" 。.!！"), start - first - begin
        self.near = self.sentence[max(begin, start - first - _REACH) : start - first]
        self.behind = self.rest[: max(0, stop - (end - first))]

    def asked(self) -> bool:
        if _says("question_mark", self.sentence.rstrip()):
            return True
        return _says("question", self.near) and not self.told("concession")

    def denied(self) -> bool:
        return _says("denial", self.near) or _says("denial_behind", self.behind) or _says("denial_next", self.rest)

    def bound(self) -> bool:
        """Whether it holds only if something happens."""
        if self.told("concession"):
            return False
        return bool(self.told("condition")) or _says("condition_behind", self.rest)

    def past(self, *, carry: bool = False) -> bool:
        """Whether it is history; with `carry`, also where an earlier clause began to tell of medicines taken."""
        if _says("past_behind", self.behind):
            return True
        for end in self.told("past")[-1:]:
            begin = len(self.before) - len(self.near)
            if _says("advice", self.before[end:]):
                return False
            return end > begin or (carry and _spoken(self.before[:begin]))
        return False

    def told(self, name: str) -> list[int]:
        """Where a pattern ends that stands before it in its sentence."""
        return [end for _, end in _spans(name, self.sentence) if end <= len(self.before)]


def urgent(text: str) -> list[Hit]:
    """Where the text calls to act at once: affirmed, of now, and not only if something happens."""
    return [
        _hit(Kind.URGENT, text, place)
        for place in _places(_pattern("urgent"), text)
        if not (place.asked() or place.denied() or place.bound() or place.past() or _says("hedge", place.near))
    ]


def dismissals(text: str) -> list[Hit]:
    """Where the text says that there is no emergency, that no help need be called, or to wait at home."""
    calm = [place for place in _places(_pattern("calm"), text) if not (_says("denial", place.near) or place.past())]
    denied = [place for place in _places(_pattern("emergency"), text) if place.denied() and not place.past()]
    hits = [
        _hit(Kind.DISMISSAL, text, place)
        for place in (*calm, *denied)
        if not (place.asked() or place.bound() or _says("supposition", place.before) or _says("drive", place.near))
        if not (_says("usually", place.near) or _says("double", place.near) or _says("rebuttal", place.rest))
    ]
    return _apart(hits)


def risky_prescription(text: str, case: str = "") -> list[Hit]:
    """Where the text newly recommends what no text should: see the kinds in `RISKY`, of which each is searched for.

    `case` is what the patient told: contraindications are looked for in its facts (allergy, pregnancy, age,
    organ failure, medicines taken). History that is quoted, questions and warnings are no recommendation.
    """
    hits = (*_medicine_hits(text, _forbidden(case)), *_dose_hits(text), *_apart(_self_medication_hits(text)))
    return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.kind))


def _apart(hits: Iterable[Hit]) -> list[Hit]:
    """Hits of one kind in order, without those that begin within another."""
    kept: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (hit.start, -hit.end)):
        if not kept or hit.start >= kept[-1].end:
            kept.append(hit)
    return kept


def _medicine_hits(text: str, forbidden: frozenset[str]) -> Iterator[Hit]:
    for place in _places(_medicines(), text):
        name = _class(place.words)
        if not (_says("order", place.near) or _says("order_behind", place.rest) or _says("plan", place.lead)):
            continue
        if place.asked() or place.denied() or place.past(carry=True):
            continue
        if _says("agent", place.before) or _says("agent_behind", place.rest):
            continue
        if _table().classes[name].prescription and not _says("continued", place.near):
            yield _hit(Kind.DRUG, text, place)
        if name in forbidden:
            yield _hit(Kind.CONTRAINDICATION, text, place)


def _dose_hits(text: str) -> Iterator[Hit]:
    for pattern, loose in (
        (_pattern("amount"), False),
        (_pattern("often"), False),
        (_pattern("daily"), True),
        (_counted(), True),
    ):
        for place in _places(pattern, text):
            if not (_ordered(place) if loose else _of_medicine(place)):
                continue
            if not (place.asked() or place.denied() or place.past(carry=True) or _says("content", place.near)):
                yield _hit(Kind.DOSE, text, place)


def _self_medication_hits(text: str) -> Iterator[Hit]:
    for pattern, loose in ((_pattern("self_medication"), False), (_pattern("by_oneself"), True)):
        for place in _places(pattern, text):
            if place.asked() or place.denied() or place.past():
                continue
            if _says("harm", place.behind) or _says("permitted", place.near + place.words):
                continue
            if not loose or _of_prescription(place):
                yield _hit(Kind.SELF_MEDICATION, text, place)


def _of_prescription(place: _Place) -> bool:
    """Whether it stands by a medicine that is not sold freely, or by one without a name."""
    around = place.lead + place.words + place.rest
    named = [_class(around[slice(*span)]) for span in _spans("names", around)]
    if named:
        return any(_table().classes[name].prescription or name == "others" for name in named)
    return _says("medicine", around)


def _ordered(place: _Place) -> bool:
    """Whether its clause names a medicine and recommends it."""
    recommended = _says("order", place.clause) or _says("order_behind", place.rest)
    return recommended and _medicines().search(place.clause) is not None


def _of_medicine(place: _Place) -> bool:
    """Whether a quantity is nearest to a medicine; where nothing is named, a verb of taking tells it."""
    length = len(place.words)
    named = _distance("names", place.sentence, len(place.before), length)
    known = [named, _distance("medicine", place.clause, place.offset, length)]
    medicine = min((distance for distance in known if distance is not None), default=None)
    other = _distance("not_medicines", place.clause, place.offset, length)
    if medicine is None:
        return not _spans("not_medicines", place.sentence) and _says("take", place.clause)
    return other is None or medicine <= other


def _distance(name: str, text: str, start: int, length: int) -> int | None:
    """Characters between a passage and the nearest match."""
    spans = _spans(name, text)
    return min((max(0, first - start - length, start - last) for first, last in spans), default=None)


@lru_cache(64)
def _spans(name: str, text: str) -> tuple[tuple[int, int], ...]:
    """Where a pattern stands in a text; kept, as the passages of a sentence ask for the same."""
    return tuple(found.span() for found in _pattern(name).finditer(text))


def _forbidden(case: str) -> frozenset[str]:
    """The classes of medicines that facts of the case forbid."""
    table, found = _table(), set[str]()
    for condition in table.conditions.values():
        if any(_stated(case, place) for place in _places(condition.pattern(), case)):
            found.update(condition.avoid)
    for place in _places(_medicines(), case):
        name = _class(place.words)
        if polarity(case, place.start, place.end) is Polarity.NEGATED:
            continue
        allergy = _pattern("allergy").search(place.clause)
        if _says("allergies", place.before) or (allergy and not _says("denial", place.clause[: allergy.start()])):
            found.update({name}.union(*(group for group in table.alike if name in group)))
        elif not allergy and _says("taken", place.near) and not (_says("may_i", place.clause) or place.denied()):
            found.update(other for rule in table.interactions if rule.taken == name for other in rule.avoid)
    age = _age(case)
    found.update(name for rule in table.ages if age is not None and age < rule.under for name in rule.avoid)
    return frozenset(found)


def _stated(case: str, place: _Place) -> bool:
    return polarity(case, place.start, place.end) is Polarity.AFFIRMED and not _says("denial", place.near)


def _age(case: str) -> float | None:
    """The youngest age in years that a case states, or that its words suggest."""
    stated = []
    for found in _pattern("age").finditer(case.translate(_NARROW).lower()):
        number = found["years"] or found["aged"] or found["months"]
        years = float(_NUMERALS.get(number) or number) if number else 12 * _INFANT
        stated.append(years if found["years"] or found["aged"] else years / 12)
    suggested = [young.years for young in _table().young if re.search(young.words, case, re.IGNORECASE)]
    return min(stated or suggested, default=None)


def _places(pattern: re.Pattern[str], text: str) -> Iterator[_Place]:
    plain = _CHINESE_COMMA.sub(lambda mark: "，" if mark[0] == "," else "：", text.translate(_NARROW))
    for sentence in (found.span() for found in _SENTENCE.finditer(plain) if found[0].strip()):
        for found in pattern.finditer(plain, *sentence):
            yield _Place(plain, sentence, *found.span())


def _hit(kind: Kind, text: str, place: _Place) -> Hit:
    return Hit(kind=kind, text=text[place.start : place.end], start=place.start, end=place.end)


def _spoken(text: str) -> bool:
    """Whether a text tells of medicines."""
    return _says("take", text) or bool(_spans("names", text))


def _says(name: str, text: str) -> bool:
    return _pattern(name).search(text) is not None


@cache
def _table() -> _Table:
    return _Table.model_validate(yaml.safe_load(files("preceptor.clinical").joinpath("safety.yaml").read_text("utf-8")))


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """A pattern of the table, with its fragments filled in; or names of medicines, or of what is none."""
    if name == "names":
        return _medicines()
    if name == "not_medicines":
        return _table().not_medicines.pattern()
    return re.compile(_filled(_table().patterns[name]), re.IGNORECASE | re.VERBOSE)


def _filled(pattern: str) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda fragment: _filled(_table().fragments[fragment[1]]), pattern)


@cache
def _medicines() -> re.Pattern[str]:
    """Any medicine that the table knows."""
    classes = _table().classes.values()
    return _Names(
        zh=[name for known in classes for name in known.zh], en=[n for known in classes for n in known.en]
    ).pattern()


@cache
def _counted() -> re.Pattern[str]:
    """A number of a named medicine: "two Tylenol"."""
    number = r"\b(?:half(?:\s+an?)?|one|two|three|four|a\s+couple\s+of|\d)\s+"
    return re.compile(f"{number}(?={_medicines().pattern})", re.IGNORECASE)


@cache
def _class(name: str) -> str:
    """The class of a medicine that `_medicines` found."""
    return next(known for known, names in _table().classes.items() if names.pattern().fullmatch(name))
