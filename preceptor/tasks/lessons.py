"""Lessons in the textbook's language for a student that has no language yet: no lesson teaches a diagnosis.

Records are written about findings that are drawn with no disease behind them, so that neither the names nor the
company of findings betray any medicine. Diseases stand in answers only where the question named them, drawn at
random too. What is left to learn is reading: which finding a phrase means, whether it is affirmed or denied, where
the record says it, how to weigh many findings at once, and how to write the JSON. Weighing is taught on keys: each
sorts patients under twenty letters, every letter with a random handful of findings that speak for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.clinical.textbook.book import Style, Textbook, Writing
from preceptor.clinical.textbook.exact import REASONS
from preceptor.clinical.textbook.posterior import SEXES
from preceptor.clinical.textbook.reader import Mention
from preceptor.clinical.textbook.sampler import Patient, tell, write
from preceptor.core.records import Diagnosis, Language, Polarity, Row
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import canonical

KINDS = ("gloss", "list", "key", "write", "quote")
LETTERS = "ABCDEFGHIJKLMNOPQRST"
KEYS = 10
ASKED = 5
"""Keys of one lesson."""
SPEAKS = 0.12
"""Chance that a finding speaks for a letter."""
WRITING = Writing(present=0.92, absent=0.6, listed=0.9)
"""Denials are many, and mostly in lists, so that they are learnt."""
FULL = 0.04
"""Share of records with a hospital's sections."""
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class _Record:
    text: str
    mentions: Sequence[Mention]

    def quote(self, mention: Mention) -> str:
        return self.text[mention.start : mention.end]

    def affirmed(self) -> list[Mention]:
        return [m for m in self.mentions if m.form in ("clear", "lay")]


def lessons(book: Textbook, shares: Mapping[str, float], n: int, seed: int) -> Iterator[Row]:
    """`n` lessons of the kinds in `shares`, half in each language; lesson i depends on shares, seed and i alone."""
    school = _School(book, shares)
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        yield school.lesson(f"lesson-{seed}-{number}", LANGUAGES[number % 2], rng)


class _School:
    def __init__(self, book: Textbook, shares: Mapping[str, float]) -> None:
        self.book = book
        self.kinds = list(shares)
        self.shares = np.array(list(shares.values())) / sum(shares.values())
        self.findings = list(book.findings)
        self.place = {finding: i for i, finding in enumerate(self.findings)}
        rng = np.random.default_rng(0)
        shape = (KEYS, len(LETTERS), len(self.findings))
        self.strength = np.where(rng.random(shape) < SPEAKS, rng.uniform(1, 3, shape), 0.0)
        """How strongly a finding speaks for a letter of a key."""
        self.prompts = {(act, lang): prompts.load("lessons", act, lang) for act in shares for lang in LANGUAGES}

    def lesson(self, identity: str, language: Language, rng: np.random.Generator) -> Row:
        act = str(rng.choice(self.kinds, p=self.shares))
        shown, ask, answer = getattr(self, f"_{act}")(language, rng)
        messages = tuple(
            turn.model_copy(update={"content": turn.content.replace("{ask}", ask)})
            for turn in self.prompts[act, language].render(shown)
        )
        return Row(id=identity, messages=messages, answer=answer, case_id=identity)

    def _record(self, language: Language, rng: np.random.Generator, likely: Sequence[str] = ()) -> _Record:
        """A record of random findings, and of about half of those that are `likely`."""
        present = rng.choice(self.findings, size=int(rng.integers(2, 8 if likely else 12)), replace=False).tolist()
        present += [f for f in likely if f not in present and rng.random() < 0.5]  # noqa: PLR2004  a coin
        style: Style = "full" if rng.random() < FULL else "short"
        sex = SEXES[int(rng.integers(2))]
        patient = Patient(sex, int(rng.integers(3, 91)), int(rng.integers(1, 15)), (), frozenset(present))
        text, mentions = write(self.book, patient, tell(self.book, present, WRITING, rng), language, style)
        return _Record(text, mentions)

    def _name(self, finding: str, language: Language) -> str:
        return self.book.findings[finding].words(language).name

    def _gloss(self, language: Language, rng: np.random.Generator) -> tuple[str, str, str]:
        """Phrases in no order, each to be copied and named."""
        phrases, lines = [], []
        for finding in rng.choice(self.findings, size=int(rng.integers(3, 11)), replace=False).tolist():
            words = self.book.findings[finding].words(language)
            denied = rng.random() < 0.3  # noqa: PLR2004  about as often as in records
            phrases.append(str(rng.choice(words.negated if denied else (*words.clear, *words.lay))))
            lines.append(f"{phrases[-1]} = {'-' if denied else '+'}{words.name}")
        return ("，" if language == "zh" else ", ").join(phrases), "", "\n".join(lines)

    def _list(self, language: Language, rng: np.random.Generator) -> tuple[str, str, str]:
        """The findings by name, in the order of the text."""
        record = self._record(language, rng)
        told = sorted((m for m in record.mentions if m.form != "blurred"), key=lambda m: m.start)
        signs = {Polarity.AFFIRMED: "+", Polarity.NEGATED: "-"}
        return record.text, "", "\n".join(signs[m.polarity] + self._name(m.subject, language) for m in told) or "-"

    def _key(self, language: Language, rng: np.random.Generator) -> tuple[str, str, str]:
        """The letters under which the patient stands by several keys, and the reasons for the first."""
        keys = rng.choice(KEYS, size=ASKED, replace=False).tolist()
        drawn = self.strength[keys[0], rng.integers(len(LETTERS))]
        record = self._record(language, rng, [f for f, strong in zip(self.findings, drawn, strict=True) if strong])
        affirmed = record.affirmed()
        weights = np.zeros(len(self.findings))
        for mention in record.mentions:
            if mention.form != "blurred":
                weights[self.place[mention.subject]] = -0.5 if mention.form == "negated" else 1.0
        best = (self.strength[keys] @ weights).argmax(1).tolist()
        for_first = self.strength[keys[0], best[0]]
        reasons = sorted(affirmed, key=lambda m: -for_first[self.place[m.subject]])[:REASONS]
        quotes = [record.quote(m) for m in sorted(reasons, key=lambda m: m.start) if for_first[self.place[m.subject]]]
        names = tuple(f"{key}{LETTERS[letter]}" for key, letter in zip(keys, best, strict=True)) if affirmed else ()
        ask = f"索引：{'，'.join(map(str, keys))}。" if language == "zh" else f"Keys: {', '.join(map(str, keys))}."
        return record.text, ask, canonical(Diagnosis(diseases=names, reason=tuple(quotes)))

    def _write(self, language: Language, rng: np.random.Generator) -> tuple[str, str, str]:
        """A dictation: names of diseases and findings in, JSON with the findings' words out."""
        record, zh = self._record(language, rng), language == "zh"
        affirmed = record.affirmed()
        number = int(rng.choice([0, 1, 2], p=[0.1, 0.6, 0.3]))
        diseases = rng.choice(list(self.book.diseases), size=number, replace=False).tolist()
        names = tuple(self.book.diseases[d].name(language) for d in diseases)
        size = min(len(affirmed), int(rng.integers(0, 5))) if names else 0
        chosen = [affirmed[i] for i in sorted(rng.choice(len(affirmed), size=size, replace=False))] if size else []
        none, comma = ("无", "，") if zh else ("none", ", ")
        told = (
            comma.join(names) or none,
            comma.join(self._name(m.subject, language) for m in chosen) or none,
        )
        ask = "疾病：{}。发现：{}。" if zh else "Diseases: {}. Findings: {}."
        answer = canonical(Diagnosis(diseases=names, reason=tuple(record.quote(m) for m in chosen)))
        return record.text, ask.format(*told), answer

    def _quote(self, language: Language, rng: np.random.Generator) -> tuple[str, str, str]:
        """Findings by name, in no order: the record's words for each that is there, a dash for the others."""
        record, zh = self._record(language, rng), language == "zh"
        told = [m.subject for m in record.mentions if m.form != "blurred"]
        said = {m.subject: record.quote(m) for m in record.affirmed()}
        size = min(len(told), int(rng.integers(1, 9)))
        asked = rng.choice(told, size=size, replace=False).tolist() if told else []
        if not asked or rng.random() < 0.3:  # noqa: PLR2004  often enough to be learnt
            asked.insert(int(rng.integers(len(asked) + 1)), str(rng.choice(self.findings)))
        asked = list(dict.fromkeys(asked))
        names = ("，" if zh else ", ").join(self._name(finding, language) for finding in asked)
        return (
            record.text,
            f"发现：{names}。" if zh else f"Findings: {names}.",
            "\n".join(said.get(f, "-") for f in asked),
        )
