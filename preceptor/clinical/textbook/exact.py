"""The answerer that knows the textbook: the limit for every student, and what the textbook teacher says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from typing import Generic, Literal, TypeVar, get_args

import numpy as np

from preceptor.clinical.textbook.book import Textbook, load
from preceptor.clinical.textbook.posterior import Floats, Posterior, World
from preceptor.clinical.textbook.reader import Mention, Reader, Reading
from preceptor.core.records import Diagnosis, Evidence, Language

T = TypeVar("T")
U = TypeVar("U")
Confidence = Literal["honest", "over", "under"]
"""Who reads: one who is right about his doubts, one who has too few of them, one who has too many."""
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)

SUPPORTS = float(np.log(1.5))
"""A finding speaks for a disease when it is at least half as likely again with it as overall."""
REASONS = 4
"""Most reasons that an answer gives unless another number is asked for."""
_LOOKS, _OVERLOOKED = 8, 0.3
"""Of the under-confident reader: how often he looks, and the share of the findings that a look misses."""
_RISKS = ("low", "medium", "high", "high", "critical", "critical")
"""By severity, one more with a red flag."""
_FEW, _MANY = 5, 12
"""Details of a simple record, and of one that isn't complex."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What may be said, with probabilities; `best` is the place of what is said at temperature 0."""

    options: tuple[T, ...]
    probabilities: Floats
    best: int = 0

    @classmethod
    def even(cls, options: tuple[T, ...]) -> "Choice[T]":
        """Each as likely as the others; of one there is no choice."""
        return cls(options, np.full(len(options), 1 / len(options)))

    def draw(self, temperature: float, seed: int | None) -> int:
        """The place of an option: the best, or drawn in proportion to the probabilities ** (1 / temperature)."""
        if temperature <= 0 or len(self.options) == 1:
            return self.best
        power = (np.log(np.maximum(self.probabilities, 1e-300)) / temperature).astype(float)
        weights = np.exp(power - power.max())
        return int(np.random.default_rng(seed).choice(len(weights), p=weights / weights.sum()))

    def said(self, words: Sequence[U]) -> "Choice[U]":
        """The same in other words, one for each option; options that read alike are one."""
        distinct = list(dict.fromkeys(words))
        place = {word: number for number, word in enumerate(distinct)}
        probabilities = np.bincount([place[word] for word in words], self.probabilities).astype(np.float64)
        return Choice(tuple(distinct), probabilities, place[words[self.best]])


class Exact:
    """Reads records with full knowledge of the world that wrote them; see `Confidence` for the two who misjudge it.

    The over-confident reader ignores the latent groups. The under-confident one looks several times, overlooks other
    findings each time, takes them for silence, and believes the mean: he is right more often than he thinks.
    """

    def __init__(self, book: Textbook, confidence: Confidence = "honest") -> None:
        self.book = book
        self.confidence = confidence
        self.world = World(book, latent=confidence != "over")
        self.reader = Reader(book)

    def posterior(self, text: str) -> Posterior:
        """Probabilities of the diseases given what `text` says."""
        return self.believe(text, self.reader.read(text))

    def believe(self, text: str, reading: Reading) -> Posterior:
        """The same where the text has been read."""
        if self.confidence != "under":
            return self.world.posterior(reading)
        looks = [_look(text, reading, number) for number in range(_LOOKS)]
        return self.world.believed(np.mean([self.world.posterior(look).probabilities for look in looks], axis=0))

    def choice(self, posterior: Posterior) -> Choice[tuple[str, ...]]:
        """The diseases that may be named, likelier ones first: as the posterior has it, with `World.exact` the best.

        Abstention is a decision, and certain.
        """
        best = self.world.exact(posterior)
        if not best:
            return Choice.even(((),))
        rank = {disease: place for place, disease in enumerate(posterior.marginals)}
        named = tuple(tuple(sorted(h, key=rank.__getitem__)) for h in posterior.hypotheses)
        return Choice(named, posterior.probabilities, named.index(best))

    def answer(self, text: str, language: Language, temperature: float = 0.0, seed: int | None = None) -> Diagnosis:
        """An answer to the record, in its language; no disease where the record does not say enough.

        At temperature 0 it is the best answer. Above, diseases are drawn from the posterior raised to the power
        1 / temperature, the same for the same seed; abstention is a decision and not drawn.
        """
        reading = self.reader.read(text)
        choice = self.choice(self.believe(text, reading))
        diseases = choice.options[choice.draw(temperature, seed)]
        evidence = self.evidence(text, reading, diseases, language, REASONS)
        return Diagnosis(
            diseases=tuple(self.book.diseases[d].name(language) for d in diseases),
            reason=tuple(e.text for e in evidence),
            evidence=evidence,
        )

    def thinking(self, text: str, language: Language) -> str:
        """What the record says, a line each in its order: `+` and `-` before a finding by name, `?` before a blur."""
        reading = self.reader.read(text)
        sex = {"male": ("Man", "男"), "female": ("Woman", "女"), None: ("", "")}[reading.sex][language == "zh"]
        age = "" if reading.age is None else f"{reading.age}岁" if language == "zh" else str(reading.age)
        lines = [("，" if language == "zh" else ", ").join(part for part in (sex, age) if part)]
        for mention in reading.mentions:
            if mention.form == "blurred":
                lines.append("?" + text[mention.start : mention.end])
            else:
                sign = "-" if mention.form == "negated" else "+"
                lines.append(sign + self.book.findings[mention.subject].words(language).name)
        return "\n".join(line for line in lines if line)

    def ask(self, text: str, language: Language) -> str:
        """The name of the finding about which to ask first, to learn most of the diseases; see `World.worth_asking`.

        Empty where nothing in the record has a place in the textbook: then it says nothing of what is missing.
        """
        reading = self.reader.read(text)
        worth = self.world.worth_asking(reading) if reading.mentions else {}
        return next((self.book.findings[finding].words(language).name for finding in worth), "")

    def metadata(self, text: str) -> dict[str, str | int]:
        """What kind of case the record is, by its likeliest disease."""
        reading = self.reader.read(text)
        return self.kind(reading, (next(iter(self.believe(text, reading).marginals)),))

    def kind(self, reading: Reading, diseases: Sequence[str]) -> dict[str, str | int]:
        """What kind of case a record of these diseases is: by them, red flags, number of details and lay words."""
        forms = [mention.form for mention in reading.mentions]
        severity = max(self.book.diseases[d].severity for d in diseases)
        risk = min(severity + bool(self.red_flags(reading, diseases)), len(_RISKS)) if forms else 1
        lay = forms.count("lay") / max(1, len(forms))
        return {
            "risk_level": _RISKS[risk - 1],
            "specialty": self.book.diseases[diseases[0]].specialty if forms else "general",
            "complexity": 1 + (len(forms) > _FEW) + (len(forms) > _MANY),
            "lang_style": "colloquial" if lay > 1 / 2 else "standard" if lay else "professional",
        }

    def red_flags(self, reading: Reading, diseases: Sequence[str]) -> tuple[str, ...]:
        """The findings that make one of these diseases urgent and that the record says are there, by id."""
        flags = {flag for d in diseases for flag in self.book.diseases[d].red_flags}
        return tuple(sorted(flags & {mention.subject for mention in _affirmed(reading)}))

    def evidence(
        self,
        text: str,
        reading: Reading,
        diseases: tuple[str, ...],
        language: Language,
        limit: int | None = None,
    ) -> tuple[Evidence, ...]:
        """The `limit` mentions that speak most strongly for one of the diseases, in the order of the text."""
        (mentions,) = self.mentions(reading, [diseases], limit)
        found = []
        for mention in mentions:
            disease = max(diseases, key=lambda d: (self._support[d][self.world.index[mention.subject]], d))
            found.append(
                Evidence(
                    text=text[mention.start : mention.end],
                    start=mention.start,
                    end=mention.end,
                    finding=mention.subject,
                    disease=self.book.diseases[disease].name(language),
                )
            )
        return tuple(found)

    def mentions(
        self,
        reading: Reading,
        answers: Sequence[tuple[str, ...]],
        limit: int | None = None,
        characters: int | None = None,
    ) -> list[list[Mention]]:
        """For each answer's diseases the mentions that `evidence` quotes, none of more than `characters`."""
        said = [m for m in _affirmed(reading) if characters is None or m.end - m.start <= characters]
        support = {d: [row[self.world.index[m.subject]] for m in said] for d, row in self._support.items()}
        chosen = []
        for diseases in answers:
            strength = list(map(max, zip(*(support[d] for d in diseases), strict=True))) if diseases else []
            speaking = [place for place, value in enumerate(strength) if value >= SUPPORTS]
            strongest = sorted(speaking, key=lambda place: -strength[place])[:limit]
            chosen.append([said[place] for place in sorted(strongest)])
        return chosen

    @cached_property
    def _support(self) -> dict[str, list[float]]:
        return {disease: self.world.support(disease).tolist() for disease in self.book.diseases}


def _affirmed(reading: Reading) -> list[Mention]:
    """The first mention of each finding that the record says is there."""
    first: dict[str, Mention] = {}
    for mention in reading.mentions:
        if mention.form in ("clear", "lay"):
            first.setdefault(mention.subject, mention)
    return list(first.values())


def _look(text: str, reading: Reading, number: int) -> Reading:
    """What one look at a record sees of it: the same findings whenever it is repeated."""

    def seen(mention: Mention) -> bool:
        drawn = sha256(f"{number} {mention.subject} {text}".encode(errors="replace")).digest()
        return int.from_bytes(drawn[:4], "big") >= _OVERLOOKED * 2**32

    return replace(reading, mentions=tuple(filter(seen, reading.mentions)))


@cache
def exact(confidence: Confidence = "honest") -> Exact:
    """The exact answerer of the textbook that comes with the package, or one who misjudges his own confidence."""
    return Exact(load(), confidence)
