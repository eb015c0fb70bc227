"""Lessons in the textbook's language for a student that has no language yet: no lesson teaches a diagnosis.

Records are written about findings that are drawn at random, with no disease behind them, so that neither the
names nor the company of findings betray any medicine. Diseases stand in answers only where the question named
them, drawn at random too. What is left to learn is reading: which finding a phrase means, whether it is affirmed
or denied, where the record says it, how to weigh many findings at once, and how to write the JSON.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from preceptor.clinical.textbook.book import Style, Textbook, spoken
from preceptor.clinical.textbook.posterior import SEXES
from preceptor.clinical.textbook.reader import Mention
from preceptor.clinical.textbook.sampler import Patient, tell, write
from preceptor.core.records import Diagnosis, Language, Polarity, Row
from preceptor.tasks import prompts
from preceptor.tasks.diagnosis import canonical

SHARES = {
    "copy": 0.25,
    "word": 0.10,
    "read": 0.25,
    "quote": 0.06,
    "write": 0.20,
    "key": 0.08,
    "gist": 0.04,
    "continue": 0.02,
}
LETTERS = "ABCDEFGHIJKLMNOPQRST"
KEYS = 24
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class _Record:
    text: str
    language: Language
    mentions: Sequence[Mention]

    def quote(self, mention: Mention) -> str:
        return self.text[mention.start : mention.end]

    def affirmed(self) -> list[Mention]:
        return [m for m in self.mentions if m.form in ("clear", "lay")]


def lessons(book: Textbook, n: int, seed: int) -> Iterator[Row]:
    """`n` lessons, half of them in each language; lesson i depends on the seed and i alone."""
    school = _School(book)
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        yield school.lesson(f"lesson-{seed}-{number}", LANGUAGES[number % 2], rng)


class _School:
    def __init__(self, book: Textbook) -> None:
        self.book = book
        self.findings = list(book.findings)
        self.blur_of = {f: name for name, blur in book.world.blurs.items() for f in blur.findings}
        keys = np.random.default_rng(0).integers(len(LETTERS), size=(KEYS, len(self.findings)))
        self.letters = [{f: LETTERS[i] for f, i in zip(self.findings, row, strict=True)} for row in keys]
        said = {lang: [phrase for _, phrase, _ in spoken(book, lang)] for lang in LANGUAGES}
        self.words = {
            "en": sorted({word for phrase in said["en"] for word in phrase.split()}),
            "zh": sorted({character for phrase in said["zh"] for character in phrase}),
        }
        self.prompts = {(act, lang): prompts.load("lessons", act, lang) for act in SHARES for lang in LANGUAGES}

    def lesson(self, identity: str, language: Language, rng: np.random.Generator) -> Row:
        act = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        record = self._record(language, rng)
        shown, ask, answer = getattr(self, f"_{act}")(record, rng)
        messages = tuple(
            turn.model_copy(update={"content": turn.content.replace("{ask}", ask)})
            for turn in self.prompts[act, language].render(shown)
        )
        return Row(id=identity, messages=messages, answer=answer, case_id=identity)

    def _record(self, language: Language, rng: np.random.Generator) -> _Record:
        """A record of random findings; one in twelve has a hospital's sections."""
        present = rng.choice(self.findings, size=int(rng.integers(2, 12)), replace=False).tolist()
        style: Style = "full" if rng.random() < 1 / 12 else "short"
        sex = SEXES[int(rng.integers(2))]
        patient = Patient(sex, int(rng.integers(3, 91)), int(rng.integers(1, 15)), (), frozenset(present))
        telling = tell(self.book, present, "full" if rng.random() < 0.4 else "short", rng)  # noqa: PLR2004
        text, mentions = write(self.book, patient, telling, language, style)
        return _Record(text, language, mentions)

    def _name(self, finding: str, language: Language) -> str:
        return self.book.findings[finding].words(language).name

    def _read(self, record: _Record, _: np.random.Generator) -> tuple[str, str, str]:
        """Every phrase, the finding that it means, and whether it is there."""
        told = [m for m in record.mentions if m.form != "blurred"]
        lines = [f"{record.quote(m)} = {self._sign(m)}{self._name(m.subject, record.language)}" for m in told]
        return record.text, "", "\n".join(lines) or "-"

    def _sign(self, mention: Mention) -> str:
        return "-" if mention.polarity is Polarity.NEGATED else "+"

    def _quote(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        told = {m.subject: record.quote(m) for m in record.mentions if m.form != "blurred"}
        asked = str(rng.choice(list(told) if told and rng.random() < 0.85 else self.findings))  # noqa: PLR2004
        return record.text, self._name(asked, record.language), told.get(asked, "-")

    def _gist(self, record: _Record, _: np.random.Generator) -> tuple[str, str, str]:
        votes = Counter(self.blur_of[m.subject] for m in record.affirmed())
        most = max(self.book.world.blurs, key=lambda blur: votes[blur])
        return record.text, "", self.book.world.blurs[most].phrases(record.language)[0] if votes else "-"

    def _key(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        key = int(rng.integers(KEYS))
        votes = Counter(self.letters[key][m.subject] for m in record.affirmed())
        ask = f"Key {key + 1}." if record.language == "en" else f"索引{key + 1}。"
        return record.text, ask, max(LETTERS, key=lambda letter: votes[letter]) if votes else "-"

    def _word(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        """A phrase alone."""
        finding = self.book.findings[str(rng.choice(self.findings))]
        words = finding.words(record.language)
        denied = rng.random() < 0.3  # noqa: PLR2004
        phrase = str(rng.choice(words.negated if denied else (*words.clear, *words.lay)))
        return phrase, "", f"{'-' if denied else '+'}{words.name}"

    def _copy(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        """Words in no order, so that nothing but looking back can tell the next one."""
        words = rng.choice(self.words[record.language], size=int(rng.integers(4, 24))).tolist()
        text = ("" if record.language == "zh" else " ").join(words)
        return text, "", text

    def _continue(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        cut = int(rng.integers(len(record.text) // 3, len(record.text)))
        return record.text[:cut], "", record.text[cut:]

    def _write(self, record: _Record, rng: np.random.Generator) -> tuple[str, str, str]:
        """A dictation: names of diseases and findings in, JSON with the findings' words out."""
        zh = record.language == "zh"
        affirmed = record.affirmed()
        number = int(rng.choice([0, 1, 2], p=[0.1, 0.6, 0.3]))
        diseases = rng.choice(list(self.book.diseases), size=number, replace=False).tolist()
        names = tuple(self.book.diseases[d].name(record.language) for d in diseases)
        size = min(len(affirmed), int(rng.integers(0, 5))) if names else 0
        chosen = [affirmed[i] for i in sorted(rng.choice(len(affirmed), size=size, replace=False))] if size else []
        none, comma = ("无", "，") if zh else ("none", ", ")
        told = (
            comma.join(names) or none,
            comma.join(self._name(m.subject, record.language) for m in chosen) or none,
        )
        ask = "疾病：{}。发现：{}。" if zh else "Diseases: {}. Findings: {}."
        answer = canonical(Diagnosis(diseases=names, reason=tuple(record.quote(m) for m in chosen)))
        return record.text, ask.format(*told), answer
