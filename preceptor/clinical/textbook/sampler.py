"""Draws patients from the textbook and writes their records.

The world of a case (patient, what is told, in which form and order) is drawn first and from the seed alone;
language only chooses the words. So both languages say the same, and case i doesn't depend on how many are drawn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from preceptor.clinical.evidence import polarity
from preceptor.clinical.textbook.advice import advise
from preceptor.clinical.textbook.book import Form, Kind, Sex, Style, Textbook, Writing
from preceptor.clinical.textbook.exact import Exact, exact
from preceptor.clinical.textbook.posterior import SEXES, World
from preceptor.clinical.textbook.reader import Mention
from preceptor.core.records import Case, Diagnosis, Language, Polarity, Task

ADULT = 18


@dataclass(frozen=True)
class Told:
    """A detail as the record will say it: `subject` is a finding, or a blur. `choice` in [0, 1) picks the words."""

    subject: str
    form: Form
    choice: float
    listed: bool = False
    """Denied together with others: "denies fever, chills"."""


@dataclass(frozen=True)
class Patient:
    """Whom the record is about. `days` is how long the complaint has lasted."""

    sex: Sex
    age: int
    days: int
    diseases: tuple[str, ...]
    present: frozenset[str]


def sample(n: int, seed: int, language: Language, style: Style = "full") -> list[Case]:
    """`n` cases of the textbook that comes with the package: text, gold, evidence and exact differential."""
    return list(draw(n, seed, language, style))


def draw(n: int, seed: int, language: Language, style: Style = "full", task: Task = "diagnosis") -> Iterator[Case]:
    """The same, one by one; of the task consult gold is the advice that the patient's true diseases call for."""
    told = _advised if task == "consult" else _case
    return (told(exact(), i, seed, language, style) for i in range(n))


def _advised(answerer: Exact, number: int, seed: int, language: Language, style: Style) -> Case:
    """The same case with advice for gold. Its red flags are those told, for advice can heed no others."""
    case = _case(answerer, number, seed, language, style)
    assert isinstance(case.gold, Diagnosis)
    names = {disease.name(language): key for key, disease in answerer.book.diseases.items()}
    diseases = tuple(names[name] for name in case.gold.diseases)
    reading = answerer.reader.read(case.text)
    kind = {**answerer.kind(reading, diseases), "red_flags": list(answerer.red_flags(reading, diseases))}
    advice = advise(answerer, case.text, reading, diseases, diseases[0], language)
    return case.model_copy(update={"gold": advice, "meta": {**case.meta, **kind}})


def _case(answerer: Exact, number: int, seed: int, language: Language, style: Style) -> Case:
    rng = np.random.default_rng([seed, number])
    book, patient = answerer.book, draw_patient(answerer.world, rng)
    text, _ = write(book, patient, tell(book, patient.present, book.world.styles[style], rng), language, style)
    reading = answerer.reader.read(text)
    posterior = answerer.world.posterior(reading)
    evidence = answerer.evidence(text, reading, patient.diseases, language)
    diseases = [book.diseases[d] for d in patient.diseases]
    identity = f"textbook-{seed}-{number}"
    return Case(
        id=identity,
        text=text,
        language=language,
        source="textbook",
        group=identity,
        meta={
            "style": style,
            "sex": patient.sex,
            "age": patient.age,
            "specialty": diseases[0].specialty,
            "severity": max(d.severity for d in diseases),
            "red_flags": sorted({f for d in diseases for f in d.red_flags if f in patient.present}),
        },
        gold=Diagnosis(
            diseases=tuple(d.name(language) for d in diseases),
            reason=tuple(e.text for e in evidence),
            evidence=evidence,
        ),
        gold_source="textbook",
        differential={book.diseases[d].name(language): p for d, p in posterior.marginals.items()},
        expects_abstention=not answerer.world.exact(posterior),
    )


def draw_patient(world: World, rng: np.random.Generator) -> Patient:
    """A patient from the population: age and sex, diseases, latent groups, findings."""
    book = world.book
    sex: Sex = SEXES[int(rng.integers(2))]
    bands = list(book.world.ages)
    low, high = book.world.ages[bands[rng.choice(len(bands), p=[book.world.age_weights[b] for b in bands])]]
    age = int(rng.integers(low, high + 1))
    hypothesis = int(rng.choice(len(world.hypotheses), p=world.prior(sex, age)))
    state = int(rng.choice(len(world.groups), p=world.group_given[hypothesis]))
    there = rng.random(len(world.findings)) < world.present[:, hypothesis, state]
    order = rng.permutation(world.hypotheses[hypothesis]).tolist()
    present = frozenset(f for f, is_there in zip(world.findings, there, strict=True) if is_there)
    return Patient(sex, age, int(rng.integers(1, 15)), tuple(order), present)


def tell(book: Textbook, present: Iterable[str], writing: Writing, rng: np.random.Generator) -> list[Told]:
    """What a record of a style says of the findings, in random order; each blurred phrase once."""
    forms, denials = book.world.forms, book.world.denials
    blur_of = {finding: blur for blur, entry in book.world.blurs.items() for finding in entry.findings}
    there = set(present)
    told: dict[str, Told] = {}
    draws = rng.random((len(book.findings), 3))
    for (finding, entry), (mentioned, form, choice) in zip(book.findings.items(), draws.tolist(), strict=True):
        if finding in there and mentioned < writing.present:
            if form < forms.blurred:
                told.setdefault(blur_of[finding], Told(blur_of[finding], "blurred", choice))
            else:
                lay = form < forms.blurred + forms.lay
                told[finding] = Told(finding, "lay" if lay else "clear", choice)
        elif finding not in there and mentioned < entry.absent_mention * writing.absent:
            told[finding] = Told(finding, "negated", choice, entry.kind in denials and form < writing.listed)
    details = list(told.values())
    return [details[i] for i in rng.permutation(len(details))]


def write(
    book: Textbook, patient: Patient, told: Iterable[Told], language: Language, style: Style
) -> tuple[str, list[Mention]]:
    """The record of a patient, and where each detail stands in it."""
    record = _Record(book, language)
    by_kind: dict[Kind, tuple[list[Told], list[Told]]] = {
        kind: ([], []) for kind in ("symptom", "sign", "laboratory", "history")
    }
    for detail in told:
        finding = book.world.blurs[detail.subject].findings[0] if detail.form == "blurred" else detail.subject
        by_kind[book.findings[finding].kind][detail.form == "negated"].append(detail)
    (record.full if style == "full" else record.short)(patient, by_kind)
    return record.text, record.mentions


class _Record:
    """A text under way, with the places of what it mentions.

    Affirmed details come before denied ones and a semicolon parts them, for a denial reaches over the list behind it.
    """

    def __init__(self, book: Textbook, language: Language) -> None:
        self.book, self.language = book, language
        self.text = ""
        self.mentions: list[Mention] = []
        self.stop, self.comma, self.semicolon = ("。", "，", "；") if language == "zh" else (".", ", ", "; ")
        self.listing = "、" if language == "zh" else ", "

    def short(self, patient: Patient, details: dict[Kind, tuple[list[Told], list[Told]]]) -> None:
        """Two or three lines without labels."""
        chief, symptoms = _chief(details["symptom"])
        young = patient.age < ADULT
        if self.language == "zh":
            self.text += f"{'男' if patient.sex == 'male' else '女'}，{patient.age}岁，"
        else:
            who = {"male": ("Man", "Boy"), "female": ("Woman", "Girl")}[patient.sex][young]
            self.text += f"{who}, {patient.age}, "
        self._chief(chief, patient.days)
        self._sentence("\n伴" if self.language == "zh" else "\nAlso ", symptoms)
        heads = {
            "history": ("既往：", "Past: "),
            "sign": ("查体：", "Exam: "),
            "laboratory": ("检查：", "Tests: "),
        }
        before = "\n"
        for kind in ("history", "sign", "laboratory"):
            if any(details[kind]):
                self._sentence(before + heads[kind][self.language == "en"], details[kind])
                before = " " if self.language == "en" else ""

    def full(self, patient: Patient, details: dict[Kind, tuple[list[Told], list[Told]]]) -> None:
        """The labelled sections of a hospital's record."""
        chief, symptoms = _chief(details["symptom"])
        if self.language == "zh":
            self.text += f"性别: {'男' if patient.sex == 'male' else '女'}\n年龄: {patient.age}\n主诉: "
            labels = ("现病史", "既往史", "体格检查", "辅助检查")
        else:
            self.text += f"Sex: {patient.sex}\nAge: {patient.age}\nChief complaint: "
            labels = ("History of present illness", "Past history", "Physical examination", "Investigations")
        self._chief(chief, patient.days)
        told = (symptoms, details["history"], details["sign"], details["laboratory"])
        for label, part in zip(labels, told, strict=True):
            self.text += f"\n{label}: "
            self._sentence("", part)

    def _chief(self, chief: Told | None, days: int) -> None:
        if chief is None:
            self.text += ("前来就诊" if self.language == "zh" else "seen in clinic") + self.stop
            return
        self._mention(chief)
        self.text += f"{days}天" if self.language == "zh" else f" for {days} day{'s' * (days > 1)}"
        self.text += self.stop

    def _sentence(self, head: str, details: tuple[list[Told], list[Told]]) -> None:
        if not any(details):
            return
        affirmed, denied = details
        listed = [told for told in denied if told.listed and self._items(told)]
        alone = [told for told in denied if told not in listed]
        self.text += head
        self._all(affirmed, self.listing)
        self.text += self.semicolon if affirmed and denied else ""
        self._all(alone, self.comma)
        self.text += self.comma if alone and listed else ""
        self._denials(listed)
        self.text += self.stop

    def _all(self, details: Iterable[Told], between: str) -> None:
        for place, told in enumerate(details):
            self.text += between if place else ""
            self._mention(told)

    def _denials(self, details: Sequence[Told]) -> None:
        """Findings under one cue; where it and the first hold a phrase of their own, that phrase is the mention."""
        for place, told in enumerate(details):
            finding, items = self.book.findings[told.subject], self._items(told)
            scaled = told.choice * len(items)
            item = items[int(scaled)]
            cues = self.book.world.denials[finding.kind].words(self.language)
            cue = "" if place else cues[int(scaled % 1 * len(cues))]
            self.text += self.listing if place else cue
            own = [p for p in finding.words(self.language).negated if cue and (cue + item).startswith(p)]
            start = len(self.text) - len(cue) * bool(own)
            end = start + len(max(own, key=len)) if own else start + len(item)
            self.mentions.append(Mention(told.subject, told.form, start, end))
            self.text += item

    def _items(self, told: Told) -> tuple[str, ...]:
        """The words by which a finding may stand in a list of denials."""
        return listable(self.language, self.book.findings[told.subject].words(self.language).clear)

    def _mention(self, told: Told) -> None:
        if told.form == "blurred":
            phrases = self.book.world.blurs[told.subject].phrases(self.language)
        else:
            phrases = getattr(self.book.findings[told.subject].words(self.language), told.form)
        phrase = phrases[int(told.choice * len(phrases))]
        self.mentions.append(Mention(told.subject, told.form, len(self.text), len(self.text) + len(phrase)))
        self.text += phrase


@cache
def listable(language: Language, phrases: tuple[str, ...]) -> tuple[str, ...]:
    """The phrases that a denial at the head of a list is taken to deny, along with what follows them."""
    cue, item, between = ("否认", "胸痛", "、") if language == "zh" else ("denies ", "chest pain", ", ")

    def denied(phrase: str) -> bool:
        text = cue + between.join((item, phrase, item))
        starts = len(cue + item + between), len(text) - len(item)
        return all(polarity(text, start, start + len(phrase)) is Polarity.NEGATED for start in starts)

    return tuple(filter(denied, phrases))


def _chief(symptoms: tuple[list[Told], list[Told]]) -> tuple[Told | None, tuple[list[Told], list[Told]]]:
    """The first symptom that is there, and the rest."""
    affirmed, denied = symptoms
    return (affirmed[0], (affirmed[1:], denied)) if affirmed else (None, symptoms)
