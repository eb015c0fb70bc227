"""What JSON values of a reply say: the diseases, the reasons for them, and how sure of each the writer is."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from preceptor.clinical.names import split
from preceptor.core import text as texts


@dataclass
class Draft:
    """What one JSON value says; None for what it doesn't speak of."""

    diseases: list[str] | None = None
    reason: list[str] | None = None
    stated: list[Any] | dict[str, Any] = field(default_factory=dict)
    """How sure the writer is, as it stands: in the order of the diseases, or by their names."""

    @property
    def by_name(self) -> dict[str, Any]:
        """What is stated of each disease; in order only where there are as many numbers as diseases."""
        names, stated = self.diseases or [], self.stated
        if isinstance(stated, list):
            pairs = zip(names, stated, strict=True) if len(names) == len(stated) else ()
            return dict(reversed([*pairs]))  # of one named twice the first counts
        known = {_like(name): value for name, value in reversed(stated.items())}
        return {name: known[key] for name in names if (key := _like(name)) in known}


_DISEASES = re.compile(
    r"(?:final|primary|secondary|other|predicted|main)?(?:diseases?|diagnos[ei]s)(?:names?|\d)?"
    r"|(?:初步|最终|临床|主要|次要|其他|合并)?(?:诊断|疾病)(?:名称|结果|结论|诊断|\d)?|病名"
)
_ROLES = re.compile(r"\d{1,2}|primary|secondary|main|other|principal|first|second|third|主要|次要|其他|合并|并发症")
"""Keys under which diseases stand by their weight: they are no names."""
_REASONS = re.compile(
    r"reasons?|(?:supporting)?evidences?|rationale|justification|explanation|(?:diagnostic)?basis"
    r"|(?:诊断)?(?:依据|理由|原因)|证据"
)
_NAME = re.compile(rf"name|名称|{_DISEASES.pattern}")
SURE = re.compile(
    r"(?:diseases?|diagnos[ei]s)?(?:confidences?|probabilit(?:y|ies)|probs?|likelihoods?|certaint(?:y|ies))"
    r"(?:scores?|levels?|values?)?|(?:诊断|疾病|患病)?(?:置信度|概率|可能性|可信度|确信度|把握)(?:大小|评分|值)?"
)
"""Keys of how sure the writer is, without separators."""
_NOTHING = re.compile(
    r"无|暂无|未知|不详|(?:不|不能|无法)(?:明确|(?:明确)?(?:确定|诊断|判断))|无明确诊断|信息不足|none|unknown|n/?a|null|nil"
    r"|undetermined|uncertain|abstain|no diagnosis|cannot determine|insufficient (?:information|data)"
)
"""Words that stand where a name should, and say that there is none: an abstention."""
_NO_NAME = re.compile(
    r"json|true|false|ok(?:ay)?|yes|no|sure|done|好的?|是的?|否|嗯|可以|明白|收到|#.*|\|?[\s:|\-]+", re.IGNORECASE
)
_NUMBER = re.compile(r"(?:about|approximately|~|≈|大?约为?)?\s*(\d{1,3}(?:\.\d+)?|\.\d+)\s*(%|percent)?")
_REMARK = re.compile(r"[(（\[【]([^()（）\[\]【】]*)[)）\]】]$")
_POINTS, _PERCENT = 10, 100
"""Numbers up to the first may be points out of ten; larger ones without a % are percentages up to the second."""
_DEPTH = 4  # levels of wrapping and of JSON within strings


def drafts(value: Any, depth: int = 0) -> Iterator[Draft]:
    """What a JSON value says: itself, or whatever it wraps."""
    if depth > _DEPTH:
        return
    if isinstance(value, str):
        yield from drafts(_nested(value), depth + 1)
    elif isinstance(value, list):
        if value and depth == 0 and all(isinstance(item, str) for item in value):
            yield named(value)
        parts = [draft for item in value if isinstance(item, dict | list) for draft in drafts(item, depth + 1)]
        if any(draft.diseases is not None for draft in parts):
            stated = {name: number for draft in reversed(parts) for name, number in draft.by_name.items()}
            names = [name for draft in parts for name in draft.diseases or ()]
            yield Draft(names, [reason for draft in parts for reason in draft.reason or ()], stated)
    elif isinstance(value, dict):
        yield from _object(value, depth)


def _object(value: dict[str, Any], depth: int) -> Iterator[Draft]:
    diseases_in = _keys(value, _DISEASES)
    reason, sure = key(value, _REASONS), key(value, SURE)
    stated = _stated(value[sure]) if sure else {}
    if not diseases_in and reason is None:
        for inner in value.values():
            yield from drafts(inner, depth + 1)
        if stated:
            yield Draft(stated=stated)
        return
    # One key's value keeps its form, since a string is parted otherwise than the items of a list.
    given = value[diseases_in[0]] if len(diseases_in) == 1 else [value[name] for name in diseases_in]
    draft = named(given) if diseases_in else Draft()
    if reason is not None:
        draft.reason = [*(draft.reason or ()), *points(value[reason])]
    draft.stated = stated or draft.stated
    if not diseases_in or draft.diseases is not None:
        yield draft


def key(value: dict[str, Any], names: re.Pattern[str]) -> str | None:
    """The first key that is one of `names`."""
    return next(iter(_keys(value, names)), None)


def _keys(value: dict[str, Any], names: re.Pattern[str]) -> list[str]:
    """The keys that are one of `names`, whatever their case, width and separators."""
    return [key for key in value if names.fullmatch(_compact(key))]


def _compact(key: str) -> str:
    return re.sub(r"[\W_]", "", texts.normalise(key))


def loaded(text: str, *, strict: bool = True) -> Any:
    """The JSON value that a whole text is, or None."""
    try:
        return json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None


def _nested(text: str) -> Any:
    """JSON within a string, where line breaks have often lost their escapes."""
    return loaded(text, strict=False) if text.lstrip()[:1] in ("{", "[", '"') else None


def named(value: Any) -> Draft:
    """The diseases in a JSON value, and what stands beside them; no `diseases` where something else stands."""
    if value in (None, "", [], {}):
        return Draft([])
    said: list[str] = []
    stated: dict[str, Any] = {}
    given = list(_given(value, said, stated, 0))
    words = (name for name in given if re.search(r"[^\W\d_]", name) and not _NO_NAME.fullmatch(name))
    names = [name for name in words if not _says_nothing(name)]
    known = bool(names) or (bool(given) and all(map(_says_nothing, given)))
    return Draft(names if known else None, said or None, stated)


def _says_nothing(name: str) -> bool:
    return _NOTHING.fullmatch(texts.normalise(name)) is not None


def _given(value: Any, said: list[str], stated: dict[str, Any], depth: int) -> Iterator[str]:
    """The names in a value; reasons beside them go to `said`, numbers to `stated`."""
    if depth > _DEPTH:
        return
    if isinstance(value, str):
        inner = _nested(value)
        if inner is None:
            yield from split(value, commas=depth == 0)
        else:
            yield from _given(inner, said, stated, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _given(item, said, stated, depth + 1)
    elif isinstance(value, dict):
        yield from _described(value, said, stated, depth)


def _described(value: dict[str, Any], said: list[str], stated: dict[str, Any], depth: int) -> Iterator[str]:
    """The names in an object: under keys of their weight, as its keys, or one with what is said of it."""
    name, reason, sure = key(value, _NAME), key(value, _REASONS), key(value, SURE)
    if name is None and value and len(_keys(value, _ROLES)) == len(value):
        for item in value.values():
            yield from _given(item, said, stated, depth + 1)
    elif name is None:
        for disease, told in value.items():
            own = key(told, SURE) if isinstance(told, dict) else None
            stated.setdefault(texts.bare(disease), told[own] if own else told)
        yield from map(texts.bare, value)
        said.extend(points([told for told in value.values() if _number(told) is None]))
    else:
        names = list(_given(value[name], said, stated, depth + 1))
        if sure and len(names) == 1:
            stated.setdefault(names[0], value[sure])
        yield from names
        said.extend(points([value[reason]] if reason else []))


def points(value: Any, depth: int = 0) -> list[str]:
    """The reasons in a JSON value: in one string, in a list, or under each disease."""
    if depth > _DEPTH:
        return []
    if isinstance(value, str):
        if (inner := _nested(value)) is not None:
            return points(inner, depth + 1)
        if depth == 0:
            return texts.items(value.replace("|", "\n"))
        items = texts.numbered(value)
        if items and value.strip().startswith(items[0]):
            items = None  # A number in the midst of an item is the record's own.
        return [item for item in items or [texts.bare(value)] if item]
    if isinstance(value, dict):
        value = [told for name, told in value.items() if not SURE.fullmatch(_compact(name))]
    if isinstance(value, list):
        return [point for item in value for point in points(item, depth + 1)]
    return []


def _stated(value: Any) -> list[Any] | dict[str, Any]:
    """What stands under a key of `SURE`: numbers in order, or by name."""
    if isinstance(value, str):
        inner = _nested(value)
        value = inner if isinstance(inner, dict | list) else split(value)
    return value if isinstance(value, dict | list) else [value]


def listed(text: str) -> list[Any]:
    """The numbers that a labelled line states, in order."""
    stated = _stated(text)
    return stated if isinstance(stated, list) else []


def probabilities(draft: Draft) -> dict[str, float]:
    """The probability that is stated of each disease, in [0, 1]; none for a disease of which no number can be read.

    `80%` is a percentage, and so are bare numbers where one of them is above 10: up to that they may be points. A
    share of the body or of a vessel may stand in brackets behind a name, so a number there needs a word such as 概率.
    """
    names = dict.fromkeys(draft.diseases or ())
    raw = {**_remarked(names), **draft.by_name}
    read = {name: found for name in names if (found := _number(raw.get(name)))}
    percent = any(number > _POINTS for number, marked in read.values() if not marked)
    likely = {}
    for name, (number, marked) in read.items():
        if marked or (percent and (number >= 1 or not number)):
            likely[name] = number / _PERCENT
        elif number <= 1 and not percent:
            likely[name] = number
    return likely


def _number(value: Any) -> tuple[float, bool] | None:
    """A number from 0 to 100, and whether a % stands behind it."""
    marked = False
    if isinstance(value, str) and (found := _NUMBER.fullmatch(texts.normalise(value))):
        value, marked = float(found[1]), bool(found[2])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _PERCENT:
        return None
    return float(value), marked


def _remarked(names: Iterable[str]) -> dict[str, str]:
    """What brackets behind the names state: 肺炎（概率：80%）."""
    found = {}
    for name in names:
        if remark := _REMARK.search(name):
            bare, words = SURE.subn("", re.sub(r"[\s_:=为]", "", texts.normalise(remark[1])))
            if words:
                found[name] = bare
    return found


def _like(name: str) -> str:
    return texts.normalise(texts.bare(name))
