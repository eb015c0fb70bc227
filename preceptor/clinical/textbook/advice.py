"""What the textbook advises a patient: thinking that takes up what the record says, then advice.

It names what it may be, whom to see and what to do, and calls for help at once where a red flag is told or the disease
threatens life. It prescribes nothing. The words are in `advice.yaml`; which of several wordings is taken depends on
the record alone.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from preceptor.clinical.textbook.exact import Exact
from preceptor.clinical.textbook.reader import Mention, Reading
from preceptor.core.records import Consultation, Language

Wordings = Annotated[tuple[str, ...], Field(min_length=1)]

_MOST, _FEW = 3, 2
"""Findings that thinking takes up: those that speak for its diseases, and each kind of others."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Pair(_Entry):
    zh: str
    en: str

    def of(self, language: Language) -> str:
        return self.zh if language == "zh" else self.en


class _Words(_Entry):
    """The sentences of one language, with places to fill."""

    person: str
    sexes: Mapping[str, str]
    age: str
    there: str
    besides: str
    vague: str
    denials: str
    said: str
    absent: str
    between: str
    """Between the findings that are there."""
    apart: str
    """Between denials: it ends the reach of each."""
    join: str
    fit: Wordings
    unclear: Wordings
    alarm: str
    may_be: Wordings
    unknown: Wordings
    go: Wordings
    follow: str
    see: Wordings
    net: Wordings
    end: str


class _Advice(_Entry):
    specialties: Mapping[str, _Pair]
    steps: Mapping[str, _Pair]
    zh: _Words
    en: _Words


def advise(
    answerer: Exact, text: str, reading: Reading, diseases: Sequence[str], likeliest: str, language: Language
) -> Consultation:
    """Advice on a record by the diseases that it is put down to, the likelier first.

    Where none can be named, how urgent it is goes by the likeliest one.
    """
    book, words = answerer.book, _advice().zh if language == "zh" else _advice().en
    named = words.join.join(_inside(book.diseases[d].name(language)) for d in diseases)
    clinics = list(dict.fromkeys(book.diseases[d].specialty for d in diseases)) if reading.mentions else []
    clinic = words.join.join(_advice().specialties[c].of(language) for c in clinics or ["general"])
    chosen = int.from_bytes(sha256(text.encode(errors="replace")).digest()[:4], "big")

    def one(wordings: Wordings, filled: str = "") -> str:
        return wordings[chosen % len(wordings)].format(filled)

    think = _told(words, text, reading, answerer, diseases)
    think += one(words.fit, named) if diseases else one(words.unclear)
    answer = one(words.may_be, named) if diseases else one(words.unknown)
    steps = _advice().steps[clinics[0] if clinics else "general"].of(language)
    if urgent(answerer, reading, diseases or (likeliest,)):
        think += words.alarm
        answer += one(words.go) + words.follow.format(clinic) + steps
    else:
        answer += one(words.see, clinic) + steps + one(words.net)
    return Consultation(think=think, answer=answer + words.end)


def urgent(answerer: Exact, reading: Reading, diseases: Sequence[str]) -> bool:
    """Whether a record of these diseases calls for help at once."""
    critical = answerer.kind(reading, diseases)["risk_level"] == "critical"
    return critical or bool(answerer.red_flags(reading, diseases))


def _inside(name: str) -> str:
    """A name as it stands within a sentence."""
    return name[:1].lower() + name[1:] if name[1:2].islower() else name


def _told(words: _Words, text: str, reading: Reading, answerer: Exact, diseases: Sequence[str]) -> str:
    """What the record says, in its own words and sense; not all of it, for thinking is no copy."""
    sex = words.sexes.get(reading.sex or "", "")
    age = "" if reading.age is None else words.age.format(reading.age)
    (speaking,) = answerer.mentions(reading, [tuple(diseases)], _MOST)
    there = [m for m in reading.mentions if m.form in ("clear", "lay") and m not in speaking]
    if not speaking:
        speaking, there = there[:_MOST], there[_MOST:]
    parts = (
        (words.there, words.between, speaking),
        (words.besides, words.between, there[:_FEW]),
        (words.vague, words.between, [m for m in reading.mentions if m.form == "blurred"][:1]),
        (words.denials, words.apart, [m for m in reading.mentions if m.form == "negated"][:_FEW]),
    )

    def quoted(mention: Mention) -> str:
        said, finding = text[mention.start : mention.end], answerer.book.findings.get(mention.subject)
        denials = (*finding.zh.negated, *finding.en.negated) if finding and mention.form == "negated" else ()
        listed = denials and said.lower() not in map(str.lower, denials)  # its cue stands elsewhere in the record
        return (words.absent if listed else words.said).format(said)

    told = words.person.format(sex=sex, age=age) if sex else ""
    return told + "".join(whole.format(between.join(map(quoted, m))) for whole, between, m in parts if m)


@cache
def _advice() -> _Advice:
    return _Advice.model_validate(yaml.safe_load(files(__package__).joinpath("advice.yaml").read_text("utf-8")))
