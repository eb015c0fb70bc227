"""Raw files to cases, one row at a time: a bad row stops nothing and is never silent.

An importer turns one JSON object into a case, and raises `BadRow` where it can't.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from preceptor.core.records import Case, Issue
from preceptor.core.text import normalise

LONGEST = 100_000
"""Characters of the longest text that is taken for one patient's record."""
Split = Literal["train", "validation", "test"]
Importer = Callable[[Mapping[str, Any]], Case]


class BadRow(ValueError):  # noqa: N818  it is a row, and becomes an issue
    """A row that makes no case: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


def read(paths: Iterable[Path], importer: Importer) -> Iterator[Case | Issue]:
    """A case or an issue for every line that isn't blank. A second case of one id is an issue."""
    seen: dict[str, str] = {}
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip() or line == b"\xef\xbb\xbf\n":
                    continue
                try:
                    case = _checked(importer(json_object(line)))
                    if case.id in seen:
                        raise BadRow("id", f"{case.id!r} was met before, at {seen[case.id]}")
                except Exception as error:  # noqa: BLE001  an importer may be the user's own
                    failed = f"the importer failed ({type(error).__name__}: {error})"[:200]
                    bad = error if isinstance(error, BadRow) else BadRow("", failed)
                    yield Issue(file=str(path), line=number, field=bad.field, reason=bad.reason, action="dropped")
                    continue
                seen[case.id] = f"{path}:{number}"
                yield case


def group_of(text: str) -> str:
    """The family of a text: the same for texts that differ in case, width and white space alone."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def split_of(group: str, shares: Mapping[Split, float]) -> Split:
    """Where a family belongs: its own digest decides, so other cases never move it."""
    place = int(hashlib.sha256(f"split {group}".encode()).hexdigest()[:13], 16) / 16**13 * sum(shares.values())
    for split, share in shares.items():
        place -= share
        if place < 0:
            return split
    return next(iter(shares))  # rounding at the very end


def json_object(line: bytes) -> Mapping[str, Any]:
    """The object that a line of a JSONL file holds, byte order mark or not."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise BadRow("", f"not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise BadRow("", "it holds half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("", f"not JSON ({error})"[:200]) from error
    if not isinstance(row, dict):
        raise BadRow("", f"a row must be an object, not {type(row).__name__}")
    return row


def _checked(case: Any) -> Case:
    """What an importer gave, once it is a case with a text that can be written and read again."""
    if not isinstance(case, Case):
        raise BadRow("", f"the importer gave {type(case).__name__}, not a Case")
    if not case.text.strip():
        raise BadRow("text", "it is empty")
    if len(case.text) > LONGEST:
        raise BadRow("text", f"{len(case.text)} characters; a record has at most {LONGEST}")
    try:
        Case.model_validate_json(case.model_dump_json())
    except ValueError as error:  # nested too deeply; values that JSON has no words for
        raise BadRow("", f"it can't be kept as JSON ({error})"[:200]) from error
    return case
