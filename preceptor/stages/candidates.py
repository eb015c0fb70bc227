"""The diseases of which a model's probabilities are asked: a user's list, or those that the training rows name."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path

from preceptor.core.errors import UserError
from preceptor.core.records import Row
from preceptor.stages.base import Context, Need, read_records
from preceptor.tasks import diagnosis

CANDIDATES = "candidates"
_MOST = 300
"""That are taken from training rows."""
_LONGEST = 200
"""Characters of a name."""
_COMMENT = re.compile(r"(?:^|\s)#.*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def needs(file: str) -> Need:
    """The file, or the rows of the nearest earlier section that leaves some."""
    return Need(CANDIDATES, paths=(file,)) if file else Need(CANDIDATES, files=("rows.jsonl",))


def candidates(file: str, context: Context) -> tuple[str, ...]:
    """The diseases: those of the file in its order, one a line; of rows the commonest first.

    Raises:
        UserError: there is none, or the file can't be read.
    """
    path = context.input(CANDIDATES)
    names = _listed(path) if file else _learned(context.inputs[CANDIDATES])
    if not names:
        raise UserError(f"{context.section}.{CANDIDATES}: {path} names no disease; name a file with one a line")
    return tuple(dict.fromkeys(names))


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text; name a file with one disease a line") from error
    names = [_COMMENT.sub("", line).strip() for line in lines]
    for number, name in enumerate(names, 1):
        if len(name) > _LONGEST or _CONTROL.search(name):
            what = f"{len(name)} characters" if len(name) > _LONGEST else "a tab or another control character"
            raise UserError(f"{path}:{number}: {what} in what should be a disease's name; write one a line")
    return list(filter(None, names))


def _learned(paths: tuple[Path, ...]) -> list[str]:
    rows = chain.from_iterable(read_records(path, Row) for path in paths)
    answers = (diagnosis.parse(row.answer).output for row in rows)
    counts = Counter(name for answer in answers if answer for name in answer.diseases)
    return [name for name, _ in counts.most_common(_MOST)]
