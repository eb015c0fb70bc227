"""What can be said of a text without knowing medicine: its normal form, clauses and listed items.

Whatever finds something returns character offsets of the text as it was given.
"""

import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

_LIKE = str.maketrans("。，、；：？！“”‘’「」『』—–‐−・", '.,,;:?!""\'\'""""----·')
_SEPARATOR = re.compile(r"[。；;，、！？!?\n]|,(?!\d)|(?<!\d),|\.(?=\s|$)")

_NUMERALS = "一二三四五六七八九十"
_BOUNDARY = r"(?:^|(?<=[\s；;，,、。:：]))"
_NUMBER = re.compile(
    # 2. 2、 2) also right behind a Chinese word, but never inside 38.5, B12 or T1; "1.2型糖尿病" is item 1.
    r"(?<![0-9A-Za-z.\-/])(?P<plain>\d{1,2})\s?[.．、)）](?=\D|$|[12]型)"
    r"|[(（](?P<bracketed>\d{1,2})[)）]"
    r"|(?P<circled>[①-⑳])"
    rf"|{_BOUNDARY}[(（]?(?P<chinese>[{_NUMERALS}])[、.．)）]"
)
_BULLET = re.compile(r"^[ \t]*[-–*•●·▪][ \t]*", re.MULTILINE)
_TOKEN_ID = re.compile(rb"token_id:(\d{1,9})")
_LONE = re.compile(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")


def normalise(text: str) -> str:
    """The form in which two texts are compared: NFKC, one width of punctuation, no case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(_LIKE).casefold().split())


def clean(text: str) -> str:
    """The text without what can't be written or seen: lone surrogates, control and zero-width characters."""
    return _LONE.sub("", text).strip()


def token_id(utf8: bytes) -> int | None:
    """The id that stands in place of a token's bytes, as vLLM writes it where a request asks for ids; else None."""
    found = _TOKEN_ID.fullmatch(utf8)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Folded:
    """A text without whitespace, width and case, and what became of each character of the original."""

    text: str
    pieces: tuple[str, ...]

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Offsets in the original of a part that isn't empty."""
        ends = list(accumulate(map(len, self.pieces)))
        return bisect_right(ends, start), bisect_right(ends, end - 1) + 1


@lru_cache(maxsize=512)
def fold(text: str) -> Folded:
    """Folds a text. The last ones are kept, since one record is asked about many times in a row."""
    pieces = tuple(map(_folded, text))
    return Folded("".join(pieces), pieces)


@lru_cache(maxsize=65_536)
def _folded(character: str) -> str:
    return "".join(unicodedata.normalize("NFKC", character).translate(_LIKE).casefold().split())


def clauses(text: str) -> list[tuple[int, int]]:
    """Offsets of the clauses, without the marks and spaces around them."""
    found, start = [], 0
    for end, after in [*(match.span() for match in _SEPARATOR.finditer(text)), (len(text), len(text))]:
        if span := _stripped(text, start, end):
            found.append(span)
        start = after
    return found


def numbered(text: str) -> list[str] | None:
    """The points of a list numbered 1, 2, 3 … in any usual form, or None where no point is number 1."""
    cuts: list[tuple[int, int]] = []
    expected = 1
    for match in _NUMBER.finditer(text):
        at_boundary = match.start() == 0 or text[match.start() - 1] in " \t\n；;，,、。:：*#"
        number = _value(match)
        if number == expected and (cuts or at_boundary):
            cuts.append(match.span())
            expected += 1
        elif number == 1 and at_boundary:
            cuts.append(match.span())
            expected = 2
    if not cuts:
        return None
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), len(text)]
    return [item for start, end in zip(starts, ends, strict=True) if (item := bare(text[start:end]))]


def items(text: str) -> list[str]:
    """The points of a list that is written as one string: by number, by bullet, by line or by semicolon."""
    points = numbered(text)
    if points is None:
        points = re.split(r"[；;\n]|。(?=\s*\S)", _BULLET.sub("\n", text))
    return [point for point in map(bare, points) if point]


def bare(text: str) -> str:
    """A point without the bullet or number before it and the separators and spaces around it."""
    text = clean(text)
    marker = _BULLET.match(text) or _NUMBER.match(text)
    return text[marker.end() if marker else 0 :].strip(" \t\r\n\u3000；;，,、。")


def _value(match: re.Match[str]) -> int:
    if circled := match["circled"]:
        return ord(circled) - ord("①") + 1
    if chinese := match["chinese"]:
        return _NUMERALS.index(chinese) + 1
    return int(match["plain"] or match["bracketed"])


def _stripped(text: str, start: int, end: int) -> tuple[int, int] | None:
    part = text[start:end]
    lead = len(part) - len(part.lstrip())
    return (start + lead, start + len(part.rstrip())) if part.strip() else None
