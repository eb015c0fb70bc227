"""JSON as rows: a line each, or cut out of a text by its brackets and parsed alone.

So a broken row costs itself and not what follows.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from typing import Any

from preceptor.data.decode import LONGEST, LOST, Text

TOO_LONG = f"longer than {LONGEST} characters"
FIRSTS = 20
"""Beginnings of rows that are remembered, to know a row by after a broken one."""
_VALUE = r'\s*"[^"\n]*"\s*:\s*(?:"[^"\n]*"|[\w.+-]+|\{[^{}]*\}|\[[^\[\]{}]*\])\s*'
_WRAPPER = re.compile(
    rf'[\s\ufeff]*\{{(?:{_VALUE},)*\s*"(?:data|rows|records|items|cases|examples|results|samples)"\s*:\s*(?=\[)',
    re.IGNORECASE,
)
_WRAPPED = re.compile(rf"(?:{_VALUE},?)*\s*\}}\s*")
"""What may follow the list in its wrapper."""
_STRUCTURE = re.compile(r'"(?:[^"\\\r\n]|\\[^\r\n])*+"?|[{}\[\]]')
"""Brackets, and strings so that theirs don't count. A line's end ends a string that was never closed."""
_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")
_SCALAR = re.compile(r'(?:"[^"\r\n]*"|[\w.+-]+)(?=\s*[,\]])')


class BadRow(ValueError):  # noqa: N818  it is a row, and becomes an issue
    """A row that makes no case: which field, and why, in one line."""

    def __init__(self, field: str, reason: str) -> None:
        reason = " ".join(reason.split())[:200]
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


Row = Mapping[str, Any] | BadRow


def json_object(line: str | bytes) -> Mapping[str, Any]:
    """The object that a line of a JSONL file holds, byte order mark or not. NaN counts as null.

    Raises:
        BadRow: it holds none, or one that can't be written again.
    """
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line
        if LOST in text:
            raise BadRow("", f"not in the file's encoding (character {text.index(LOST) + 1})")
        row = json.loads(text, object_pairs_hook=_object, parse_constant=lambda _: None)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise BadRow("", f"not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise BadRow("", "it holds half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, BadRow) else BadRow("", f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRow("", f"a row must be an object, not {type(row).__name__}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(next(key for key in keys if keys.count(key) > 1), "it stands twice in one object")
    return found


def _parsed(text: str) -> Row:
    try:
        return json_object(text)
    except BadRow as error:
        return error


def is_document(text: Text, suffix: str) -> bool:
    """Whether a text is JSON of which a row is not a line. `.json` is, unless its first line is whole and not all."""
    first, _, rest = text.head.lstrip("\ufeff \t\r\n").partition(text.newline)
    listed = re.match(r"\[\s*(?:[{\]]|$)", first) is not None
    if suffix != ".json" and not listed and (not first.startswith("{") or suffix in (".csv", ".tsv", ".tab")):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        opened = _WRAPPER.match(text.head) is not None or first.rstrip().endswith(("{", "[", ","))
        return suffix == ".json" or listed or opened
    return not rest.strip() and (suffix == ".json" or listed or _WRAPPER.match(first) is not None)


def lines(text: Text) -> Iterator[tuple[int, Row]]:
    """The objects of a text that has one on every line."""
    for number, line in text.lines():
        if line is None:
            yield number, BadRow("", TOO_LONG)
        elif bare := line.strip().strip("\ufeff"):
            yield number, _parsed(bare)


def document(text: Text) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON text, whatever list they stand in.

    After a broken one, the next is looked for by the keys with which whole ones began.
    """
    ahead = _Ahead(text)
    wrapper = _WRAPPER.match(ahead.text)
    ahead.go(wrapper.end() if wrapper else 0)
    opened = closed = False
    first_keys: dict[str, None] = {}
    while True:
        between = ahead.go(_BETWEEN.match(ahead.text, ahead.at).end())  # type: ignore[union-attr]
        opened, closed = opened or "[" in between, closed or "]" in between
        if ahead.at == len(ahead.text) or (closed and wrapper and _WRAPPED.fullmatch(ahead.text, ahead.at)):
            if not ahead.more():
                break
            continue
        start, end = text.line, _end(ahead.text, ahead.at)
        while end is None and ahead.text[ahead.at] == "{" and not ahead.too_long and ahead.more():
            end = _end(ahead.text, ahead.at)
        row = _parsed(ahead.text[ahead.at : end]) if end else BadRow("", "not JSON, or cut off")
        if isinstance(row, BadRow):
            ahead.skip(end, "|".join(map(re.escape, first_keys)) or r'"[^"\n]*"')
        else:
            ahead.go(end or 0)
            if row and len(first_keys) < FIRSTS:
                first_keys[json.dumps(next(iter(row)), ensure_ascii=False)] = None
        yield start, row
    if opened and not closed and not text.broken:
        yield text.line, BadRow("", "the list of rows doesn't end: the file may be cut off")


class _Ahead:
    """What has been read of a text and not yet used, from `at` on."""

    def __init__(self, source: Text) -> None:
        self._source, self._pieces = source, source.pieces()
        self.text, self.at = next(self._pieces, ""), 0

    @property
    def too_long(self) -> bool:
        """Whether no row is as long as what is held."""
        return len(self.text) - self.at > LONGEST

    def go(self, end: int) -> str:
        """Uses the text up to an offset, and counts its lines."""
        used, self.at = self.text[self.at : end], end
        self._source.line += used.count(self._source.newline)
        return used

    def more(self) -> bool:
        """Whether there is more to read; it is added, and what was used is let go."""
        piece = next(self._pieces, "")
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def skip(self, end: int | None, keys: str) -> None:
        """Goes to the next object that begins with one of the keys, before `end` if that is known, else there."""
        following = re.compile(rf"[}}\r\n,\[\]]\s*(\{{\s*(?:{keys})\s*:)")
        found = following.search(self.text, self.at + 1, end or len(self.text))
        while not found and end is None:
            if self.too_long:
                self.go(len(self.text) - LONGEST // 2)
            if not self.more():
                break
            found = following.search(self.text, self.at)
        self.go(found.start(1) if found else end or len(self.text))


def _end(text: str, at: int) -> int | None:
    """Where the value ends that begins there, or None where no end can be told."""
    if text[at] != "{":
        scalar = _SCALAR.match(text, at)
        return scalar.end() if scalar else None
    depth = 0
    for token in _STRUCTURE.finditer(text, at):
        depth += (token[0] in "{[") - (token[0] in "}]")
        if not depth:
            return token.end()
    return None


def _written(octets: bytes) -> str:
    try:
        return octets.decode()
    except UnicodeDecodeError:  # an image, say: it is no text, and would swell every record
        return f"({len(octets)} bytes)"


def json_value(value: Any) -> Any:
    """A value as JSON has it: dates as ISO text, what is not a number as None, bytes as the text that they are."""
    if isinstance(value, datetime) and not (value.hour or value.minute or value.second or value.microsecond):
        value = value.date()
    if isinstance(value, dict):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return _written(value)
    return value if isinstance(value, str | int | None) else str(value)
