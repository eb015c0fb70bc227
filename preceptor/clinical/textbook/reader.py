"""Reads back out of a record what it says: age, sex, and each finding with its form and place.

The reader knows the textbook's phrases and takes the longest at each place, from left to right. What it does
not know it passes over, so it serves real records too, of which it understands little.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from preceptor.clinical.evidence import polarity
from preceptor.clinical.textbook.book import Form, Sex, Style, Textbook, spoken
from preceptor.core.records import Polarity

_SEX: dict[Sex, re.Pattern[str]] = {
    "male": re.compile(r"(?<!\w)(?:man|boy|male)(?!\w)|男", re.IGNORECASE),
    "female": re.compile(r"(?<!\w)(?:woman|girl|female)(?!\w)|女", re.IGNORECASE),
}
_AGE = re.compile(
    r"(?:年龄|age)\s*[:：]?\s*(\d{1,3})|(?:man|woman|boy|girl|male|female),? (\d{1,3})(?!\d)|(\d{1,3})\s*岁",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"^(?:现病史|History of present illness)\s*[:：]", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Mention:
    """One phrase of a record: `subject` is a finding's id, or a blur's where the form is blurred."""

    subject: str
    form: Form
    start: int
    end: int

    @property
    def polarity(self) -> Polarity:
        """Whether the finding is said to be there."""
        return Polarity.NEGATED if self.form == "negated" else Polarity.AFFIRMED


@dataclass(frozen=True)
class Reading:
    """What a record says. `age` in years and `sex` are None where it doesn't say them."""

    sex: Sex | None
    age: int | None
    style: Style
    mentions: tuple[Mention, ...]


class Reader:
    """A reader of both languages."""

    def __init__(self, book: Textbook) -> None:
        self._by_start: dict[str, list[tuple[str, str, Form]]] = {}
        for language in ("zh", "en"):
            for subject, phrase, form in spoken(book, language):
                self._by_start.setdefault(phrase[:2].lower(), []).append((phrase.lower(), subject, form))
        for phrases in self._by_start.values():
            phrases.sort(key=lambda item: -len(item[0]))

    def read(self, text: str) -> Reading:
        """Everything in `text` that the textbook has words for, in the order of the text."""
        return Reading(
            sex=sex(text),
            age=age(text),
            style="full" if _LABELLED.search(text) else "short",
            mentions=tuple(self._mentions(text)),
        )

    def _mentions(self, text: str) -> Iterator[Mention]:
        lower = text.lower()
        if len(lower) != len(text):  # a few letters grow, and offsets must hold
            lower = text
        place = 0
        while place < len(text):
            end = place + 1
            for phrase, subject, form in self._by_start.get(lower[place : place + 2], ()):
                if lower.startswith(phrase, place) and _bounded(lower, place, place + len(phrase)):
                    end = place + len(phrase)
                    denied = form in ("clear", "lay") and polarity(text, place, end) is Polarity.NEGATED
                    yield Mention(subject, "negated" if denied else form, place, end)
                    break
            place = end


def _bounded(text: str, start: int, end: int) -> bool:
    """Whether a phrase neither begins nor ends inside an English word."""
    return not (_inside(text[start - 1 : start + 1]) or _inside(text[end - 1 : end + 1]))


def _inside(pair: str) -> bool:
    return len(pair) == 2 and pair.isascii() and pair.isalpha()  # noqa: PLR2004  two neighbours


def sex(text: str) -> Sex | None:
    """The sex that is named first: a record begins with its patient."""
    places = [(match.start(), which) for which, pattern in _SEX.items() if (match := pattern.search(text))]
    return min(places)[1] if places else None


def age(text: str) -> int | None:
    """The patient's age in years, where a record tells it."""
    match = _AGE.search(text)
    return int(next(group for group in match.groups() if group)) if match else None
