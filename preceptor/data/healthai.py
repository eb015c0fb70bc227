"""The layout of the HealthAI competition: `{"id": …, "feature_content": …}`, one a line."""

import re
from collections.abc import Mapping
from typing import Any

from preceptor.core.records import Case, Language
from preceptor.data.files import BadRow, group_of

_HAN = re.compile(r"[\u4e00-\u9fff]")
_ID, _TEXT = "id", "feature_content"


def import_row(row: Mapping[str, Any]) -> Case:
    """One row as a case. Whatever else it holds is kept in `meta`, where no prompt sees it."""
    identity, text = row.get(_ID), row.get(_TEXT)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or not str(identity).strip():
        raise BadRow(_ID, "missing, or neither a text nor a whole number")
    if not isinstance(text, str) or not text.strip():
        raise BadRow(_TEXT, "missing, empty or not a text")
    text = text.replace("\r\n", "\n").strip()
    return Case(
        id=str(identity).strip(),
        text=text,
        language=language_of(text),
        source="healthai",
        group=group_of(text),
        meta={key: value for key, value in row.items() if key not in (_ID, _TEXT)},
    )


def language_of(text: str) -> Language:
    """Chinese if a twentieth of the characters are: records are full of numbers and Latin abbreviations."""
    return "zh" if len(_HAN.findall(text)) * 20 >= len(text) else "en"
