"""The textbook as it is written: diseases, findings, latent groups and vague phrases, checked as it loads.

Its three YAML files are meant to be read and corrected by clinicians, so every reference and every range is
checked here and a mistake is named by file and entry. `world.yaml` also holds how records are written: how
often a detail is mentioned, in which form, and below which probability the exact answerer abstains.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from preceptor.core.errors import UserError

Kind = Literal["symptom", "sign", "laboratory", "history"]
Style = Literal["full", "short"]
Sex = Literal["male", "female"]
Form = Literal["clear", "lay", "negated", "blurred"]
Probability = Annotated[float, Field(ge=0, le=1)]
Phrases = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Words(_Entry):
    """How one language speaks of a finding."""

    name: str
    clear: Annotated[tuple[str, ...], Field(min_length=3)]
    negated: Phrases
    lay: Phrases


class Finding(_Entry):
    """A symptom, sign, laboratory result or piece of history."""

    id: str
    kind: Kind
    leak: Annotated[float, Field(gt=0, le=0.2)]
    """Probability of its presence for reasons outside the textbook."""
    groups: dict[str, Probability] = {}
    """Probability that an active latent group brings it."""
    absent_mention: Annotated[float, Field(gt=0, lt=1)]
    """Probability that a full record states its absence."""
    zh: Words
    en: Words

    def words(self, language: str) -> Words:
        """Its words in `language`."""
        return self.zh if language == "zh" else self.en


class Aliases(_Entry):
    """Other names of a disease."""

    zh: Phrases
    en: Phrases


class Disease(_Entry):
    """A condition and how it shows itself."""

    id: str
    zh: str
    en: str
    aliases: Aliases
    icd10: Annotated[str, Field(pattern=r"^[A-Z]\d\d(\.\d+)?$")]
    specialty: str
    severity: Annotated[int, Field(ge=1, le=5)]
    """1 mild to 5 life-threatening."""
    red_flags: tuple[str, ...] = ()
    """Findings that make it urgent."""
    prevalence: Annotated[float, Field(gt=0, le=1)]
    """Relative weight among the textbook's diseases."""
    age: dict[str, Annotated[float, Field(gt=0, le=10)]]
    sex: dict[Sex, Annotated[float, Field(gt=0, le=10)]]
    groups: dict[str, Probability] = {}
    """Probability that it sets off a latent group."""
    findings: Annotated[dict[str, Probability], Field(min_length=1)]
    """Probability that it brings a finding by itself."""
    excludes: tuple[str, ...] = ()
    """Diseases with which it never forms a pair."""

    def name(self, language: str) -> str:
        """Its standard name in `language`."""
        return self.zh if language == "zh" else self.en


class Group(_Entry):
    """A latent state of the patient that makes findings depend on one another."""

    base: Annotated[float, Field(ge=0, lt=1)]
    zh: str
    en: str


class Blur(_Entry):
    """Vague phrases that stand for any of a set of findings."""

    findings: Annotated[tuple[str, ...], Field(min_length=2)]
    zh: Phrases
    en: Phrases

    def phrases(self, language: str) -> tuple[str, ...]:
        """Its phrases in `language`."""
        return self.zh if language == "zh" else self.en


class Writing(_Entry):
    """How completely a style of record tells what was found."""

    present: Annotated[float, Field(gt=0, lt=1)]
    """Probability that a finding that is there is mentioned."""
    absent: Annotated[float, Field(gt=0, le=1)]
    """Factor on `Finding.absent_mention`."""
    listed: Probability
    """Share of the denied findings that stand in a list under one cue."""


class Forms(_Entry):
    """Shares of the forms in which a present finding is mentioned."""

    clear: Probability
    lay: Probability
    blurred: Probability

    @model_validator(mode="after")
    def _sum(self) -> Self:
        if abs(self.clear + self.lay + self.blurred - 1) > 1e-9:  # noqa: PLR2004  rounding
            raise ValueError("clear, lay and blurred must sum to 1")
        return self


class Cues(_Entry):
    """Words that deny the list behind them, as they stand before it."""

    zh: Phrases
    en: Phrases

    def words(self, language: str) -> tuple[str, ...]:
        """The cues of `language`."""
        return self.zh if language == "zh" else self.en


class World(_Entry):
    """What holds for all diseases and findings."""

    note: str
    ages: dict[str, tuple[int, int]]
    """Bands of age in years, both ends included."""
    age_weights: dict[str, Probability]
    groups: dict[str, Group]
    blurs: dict[str, Blur]
    styles: dict[Style, Writing]
    forms: Forms
    denials: dict[Kind, Cues]
    """By the kinds of findings that are denied in lists."""
    pairs: Probability
    """Share of patients with two diseases."""
    abstain_below: Probability
    """The exact answerer names nothing when no disease reaches this marginal probability."""


class Textbook(_Entry):
    """The whole book. `findings` and `diseases` keep the order of their files."""

    world: World
    findings: dict[str, Finding]
    diseases: dict[str, Disease]

    @model_validator(mode="after")
    def _references(self) -> Self:
        for mistake in _mistakes(self):
            raise ValueError(mistake)
        return self

    def excluded(self, one: str, other: str) -> bool:
        """Whether two diseases never occur together."""
        return other in self.diseases[one].excludes or one in self.diseases[other].excludes

    def band(self, age: int) -> str:
        """The band of an age in years; ages outside all bands belong to the nearest."""
        return min(self.world.ages, key=lambda band: _distance(age, self.world.ages[band]))


def _distance(age: int, limits: tuple[int, int]) -> int:
    return max(limits[0] - age, age - limits[1], 0)


def _mistakes(book: Textbook) -> list[str]:
    """Every broken reference of the book, as one line each."""
    world = book.world
    found: list[str] = []

    def known(where: str, names: Mapping[str, Any] | tuple[str, ...], among: Mapping[str, Any]) -> None:
        found.extend(f"{where}: {name!r} is not known" for name in names if name not in among)

    for finding in book.findings.values():
        known(f"findings.yaml, {finding.id}, groups", finding.groups, world.groups)
    for disease in book.diseases.values():
        where = f"diseases.yaml, {disease.id}"
        known(f"{where}, findings", disease.findings, book.findings)
        known(f"{where}, red_flags", disease.red_flags, book.findings)
        known(f"{where}, groups", disease.groups, world.groups)
        known(f"{where}, excludes", disease.excludes, book.diseases)
        found.extend(f"{where}, age: {band!r} is missing" for band in world.ages if band not in disease.age)
        known(f"{where}, age", disease.age, world.ages)
        found.extend(f"{where}, sex: {sex!r} is missing" for sex in ("male", "female") if sex not in disease.sex)
    for name, blur in world.blurs.items():
        known(f"world.yaml, blurs, {name}", blur.findings, book.findings)
        if len({book.findings[f].kind for f in blur.findings if f in book.findings}) > 1:
            found.append(f"world.yaml, blurs, {name}: its findings are of different kinds")
    shares = Counter(f for blur in world.blurs.values() for f in blur.findings)
    found.extend(f"world.yaml, blurs: {f!r} is in {shares[f]} blurs, not one" for f in book.findings if shares[f] != 1)
    if set(world.age_weights) != set(world.ages) or abs(sum(world.age_weights.values()) - 1) > 1e-9:  # noqa: PLR2004
        found.append("world.yaml, age_weights: name each band once and sum to 1")
    found.extend(_name_clashes(book))
    return found


def _name_clashes(book: Textbook) -> list[str]:
    """Names and aliases that two diseases share, and phrases that two findings share."""
    names = Counter(
        name.casefold()
        for disease in book.diseases.values()
        for name in {disease.zh, disease.en, *disease.aliases.zh, *disease.aliases.en}
    )
    clashes = [f"diseases.yaml: the name {name!r} is used twice" for name, times in names.items() if times > 1]
    for language in ("zh", "en"):
        phrases = Counter(phrase.casefold() for _, phrase, _ in spoken(book, language))
        clashes += [f"the {language} phrase {p!r} is used {n} times" for p, n in phrases.items() if n > 1]
    return clashes


def spoken(book: Textbook, language: str) -> list[tuple[str, str, Form]]:
    """All phrases of a language as (finding or blur, phrase, form)."""
    phrases: list[tuple[str, str, Form]] = []
    for finding in book.findings.values():
        words = finding.words(language)
        forms: tuple[tuple[Form, tuple[str, ...]], ...] = (
            ("clear", words.clear),
            ("lay", words.lay),
            ("negated", words.negated),
        )
        phrases += [(finding.id, phrase, form) for form, said in forms for phrase in said]
    return phrases + [(n, p, "blurred") for n, blur in book.world.blurs.items() for p in blur.phrases(language)]


def parse(world: str, findings: str, diseases: str) -> Textbook:
    """A textbook from the text of its three files.

    Raises:
        UserError: an entry is missing, out of range, or refers to something unknown.
    """
    try:
        return Textbook(
            world=World(**_mapping("world.yaml", world)),
            findings={k: Finding(id=k, **v) for k, v in _mapping("findings.yaml", findings).items()},
            diseases={k: Disease(id=k, **v) for k, v in _mapping("diseases.yaml", diseases).items()},
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"the textbook's {error.title} is wrong at {where or 'a reference'}: {first['msg']}") from error


def _mapping(name: str, text: str) -> dict[str, Any]:
    loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  both are safe
    if not isinstance(loaded, dict):
        raise UserError(f"the textbook's {name} must map names to entries")
    return loaded


@cache
def load() -> Textbook:
    """The textbook that comes with the package."""
    folder = files("preceptor.clinical.textbook")
    return parse(*(folder.joinpath(f"{name}.yaml").read_text("utf-8") for name in ("world", "findings", "diseases")))
