"""Reads a diagnosis out of whatever a model, a competition file or a person wrote.

Strict JSON comes first, wherever it stands in the reply: that is clean. Everything else that can be read
without guessing (mended JSON, tags, labelled lines, bare names) counts as repaired. A reply that was cut off
is never completed, for half a list of diseases is another answer. Work is bounded, whatever the reply.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import json_repair

from preceptor.clinical.names import split
from preceptor.core import text as texts
from preceptor.core.records import Diagnosis, Record
from preceptor.tasks.wrapping import refuses, unwrapped


class Outcome(StrEnum):
    """What became of a reply. The last four are also the names of failures."""

    CLEAN = "clean"
    REPAIRED = "repaired"
    UNPARSED = "unparsed"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    REFUSED = "refused"


class Parsed(Record):
    """A reply as read: an output if it is clean or repaired, and why not, or how, in `detail`."""

    outcome: Outcome
    output: Diagnosis | None = None
    detail: str = ""


@dataclass
class _Draft:
    """What one JSON value says; None for what it doesn't speak of."""

    diseases: list[str] | None = None
    reason: list[str] | None = None


_DISEASES = re.compile(
    r"(?:final|primary|secondary|other|predicted|main)?(?:diseases?|diagnos[ei]s)(?:names?|\d)?"
    r"|(?:初步|最终|临床|主要|次要|其他|合并)?(?:诊断|疾病)(?:名称|结果|结论|诊断|\d)?|病名"
)
_ONE = re.compile(r"disease|diagnosis|疾病|诊断|疾病名称")
_ROLES = re.compile(r"\d{1,2}|primary|secondary|main|other|principal|first|second|third|主要|次要|其他|合并|并发症")
"""Keys under which diseases stand by their weight: they are no names."""
_REASONS = re.compile(
    r"reasons?|(?:supporting)?evidences?|rationale|justification|explanation|(?:diagnostic)?basis"
    r"|(?:诊断)?(?:依据|理由|原因)|证据"
)
_NAME = re.compile(rf"name|名称|{_DISEASES.pattern}")
_ANSWER = re.compile(r"(?:final)?answer|prediction|output|result|response|答案|预测|结果")
"""Keys of an object that may hold nothing but names."""
_NOTHING = re.compile(
    r"无|暂无|未知|不详|(?:不|不能|无法)(?:明确|(?:明确)?(?:确定|诊断|判断))|无明确诊断|信息不足|none|unknown|n/?a|null|nil"
    r"|undetermined|uncertain|abstain|no diagnosis|cannot determine|insufficient (?:information|data)"
)
"""Words that stand where a name should, and say that there is none: an abstention."""

_FENCE = re.compile(r"```[ \t]*\w*\s(.*?)```", re.DOTALL)
_BRACKET = re.compile(r"[{}\[\]\"]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?P<end>"?)', re.DOTALL)
_OPENING = re.compile(r"[{\[]")
_WIDE = str.maketrans("｛｝［］", "{}[]")
_STRUCTURE = str.maketrans("：，、；", ":,,,")
_HOLLOW = re.compile(r"```\w*|[\"'`\s]+")
_LABEL = re.compile(
    # On a line of its own or behind a mark: in brackets, as a heading, or with a colon, an = or a verb behind it.
    r"(?:^[ \t#>*+\-]*(?:\d[.、])?[ \t]*|(?<=[。；;.，,])[ \t]*)"
    r"(?:该?(?:患者|病人)的?|综上(?:所述)?[，,]?|因此[，,]?|考虑)?(?P<open>[*_]{1,3}|[【\[「『<《\"'“])?(?:"
    r"(?P<reason>(?:诊断)?(?:依据|理由)|原因|证据|reasons?|(?:supporting )?evidence|rationale|justification)"
    r"|(?P<disease>(?:初步|最终|临床|主要|最?可能的?|入院|出院|明确)?(?:诊断|疾病)(?:结果|名称|结论)?|印象|(?:最终)?答案|答"
    r"|(?:the )?(?:final |primary |most likely )?(?:diagnos[ei]s|diseases?|answer)|impression|assessment)"
    r"|(?P<other>鉴别诊断|治疗(?:方案|建议)?|处理|建议|说明|备注|置信度|分析|(?:differential|other) diagnos[ei]s"
    r"|treatment|plan|recommendations?|note|confidence|icd(?:-?10)?(?: codes?)?|analysis)"
    r")(?:(?P<close>[*_]{1,3}|[】\]」』>》\"'”])?[ \t]*(?:[为是]?[:：=][*_]{0,3}|(?<=诊断)[为是]|(?<=is) is (?=\w))"
    r"|(?(open)[*_】\]」』]{1,3}|[ \t]*(?=\n)))",
    re.IGNORECASE | re.MULTILINE,
)
_PROSE = re.compile(
    r"[。！!{}<>=:：\"]|[?？](?=.)|我|您|请|患者|病人|建议|需要|抱歉|因为|所以|可以|应该|根据"
    r"|\b(?:i|you|we|my|please|patient|cannot|can't|sorry|should|because|is|are|was|would|based|this|it|know)\b",
    re.IGNORECASE,
)
_NO_NAME = re.compile(
    r"json|true|false|ok(?:ay)?|yes|no|sure|done|好的?|是的?|否|嗯|可以|明白|收到|#.*|\|?[\s:|\-]+", re.IGNORECASE
)
_ATTEMPTS = 200
"""Places at which JSON is tried before the reply counts as noise."""
_MENDABLE, _BRACKETS = 10_000, 200
"""Characters and brackets of what is worth mending; the mender's time grows with their product."""
_DEPTH = 4  # levels of wrapping and of JSON within strings
_ASIDE = re.compile(r"""(?:[^[{"“'‘]+\[|\[[^]]*:)[^{"“'‘]*""")  # brackets in prose: nothing in them is quoted
_MOST_BARE, _LONGEST_BARE = 12, 80


def parse(text: str, finish: str = "stop") -> Parsed:
    """The diagnosis that a reply gives, or why it gives none. `finish` is how the reply ended."""
    if finish == "refusal":
        return Parsed(outcome=Outcome.REFUSED, detail="the endpoint says that the model refused")
    body, thinking = unwrapped(text)
    if not _HOLLOW.sub("", body):
        cut = thinking or finish == "length"
        return Parsed(
            outcome=Outcome.TRUNCATED if cut else Outcome.EMPTY,
            detail="the reply ends in its thinking" if thinking else "the reply is empty",
        )
    if output := _diagnosis(_strict(body)):
        return Parsed(outcome=Outcome.CLEAN, output=output)
    if finish == "length" or thinking or _cut_off(body):
        return Parsed(outcome=Outcome.TRUNCATED, detail="the reply ends before its JSON does")
    return _repaired(body)


def _repaired(body: str) -> Parsed:
    """What a reply says in any form but strict JSON."""
    refused = refuses(body)
    forms = {"mended JSON": _mended, "tags": _tagged, "table": _table, "labelled text": _labelled}
    for form, read in (forms if refused else {**forms, "bare names": _bare}).items():
        if output := _diagnosis(read(body)):
            return Parsed(outcome=Outcome.REPAIRED, output=output, detail=form)
    if refused:
        return Parsed(outcome=Outcome.REFUSED, detail="the reply declines to answer")
    return Parsed(outcome=Outcome.UNPARSED, detail="the reply names diseases in no known form")


def _diagnosis(drafts: Iterable[_Draft]) -> Diagnosis | None:
    """The last answer given, since models correct themselves; halves in two objects belong together."""
    answer = _Draft()
    for draft in drafts:
        if draft.diseases is not None:
            answer = _Draft(draft.diseases, draft.reason if draft.reason is not None else answer.reason)
        elif not answer.reason:
            answer.reason = draft.reason
    if answer.diseases is None:
        return None
    return Diagnosis(diseases=tuple(answer.diseases), reason=tuple(answer.reason or ()))


def _strict(body: str) -> Iterator[_Draft]:
    """What the JSON values of a reply say, as they are."""
    fence = _FENCE.fullmatch(body)
    whole = _loaded((fence[1] if fence else body).strip())
    if whole is not None:
        yield from _drafts(whole)
        return
    if several := _lines(body):
        yield from _drafts(several)
        return
    decoder, attempts, start = json.JSONDecoder(), 0, 0
    while attempts < _ATTEMPTS and (found := _OPENING.search(body, start)):
        attempts += 1
        start = found.start() + 1
        try:
            value, start = decoder.raw_decode(body, found.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            yield from _drafts(value)


def _lines(body: str) -> list[Any]:
    """The objects of JSON lines that name one disease each; of anything else, none."""
    lines = [line.strip().removesuffix(",") for line in body.splitlines() if line.strip()]
    values = [_loaded(line) for line in lines[:_ATTEMPTS]] if len(lines) > 1 and lines[0][:1] == "{" else []
    one = (isinstance(v, dict) and isinstance(v.get(_key(v, _ONE) or ""), str) for v in values)
    return values if all(one) else []


def _loaded(text: str, *, strict: bool = True) -> Any:
    """The JSON value that a whole text is, or None."""
    try:
        return json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None


def _drafts(value: Any, depth: int = 0) -> Iterator[_Draft]:
    """What a JSON value says of diseases and reasons: itself, or whatever it wraps."""
    if depth > _DEPTH:
        return
    if isinstance(value, str):
        yield from _drafts(_nested(value), depth + 1)
    elif isinstance(value, list):
        if value and depth == 0 and all(isinstance(item, str) for item in value):
            yield _Draft(_names(value, []))
        drafts = [draft for item in value if isinstance(item, dict | list) for draft in _drafts(item, depth + 1)]
        named = [name for draft in drafts for name in draft.diseases or ()]
        if any(draft.diseases is not None for draft in drafts):
            yield _Draft(named, [reason for draft in drafts for reason in draft.reason or ()])
    elif isinstance(value, dict):
        diseases_in = _keys(value, _DISEASES)
        reason = _key(value, _REASONS)
        if not diseases_in and reason is None:
            for inner in value.values():
                yield from _drafts(inner, depth + 1)
            return
        said: list[str] = []
        # One key's value keeps its form, since a string is parted otherwise than the items of a list.
        given = value[diseases_in[0]] if len(diseases_in) == 1 else [value[key] for key in diseases_in]
        diseases = _names(given, said) if diseases_in else None
        reasons = (said or None) if reason is None else [*said, *_points(value[reason])]
        if not diseases_in or diseases is not None:
            yield _Draft(diseases, reasons)


def _key(value: dict[str, Any], names: re.Pattern[str]) -> str | None:
    """The first key that is one of `names`."""
    return next(iter(_keys(value, names)), None)


def _keys(value: dict[str, Any], names: re.Pattern[str]) -> list[str]:
    """The keys that are one of `names`, whatever their case, width and separators."""
    return [key for key in value if names.fullmatch(re.sub(r"[\W_]", "", texts.normalise(key)))]


def _nested(text: str) -> Any:
    """JSON within a string, where line breaks have often lost their escapes."""
    return _loaded(text, strict=False) if text.lstrip()[:1] in ("{", "[", '"') else None


def _names(value: Any, said: list[str], depth: int = 0) -> list[str] | None:
    """The diseases in a JSON value; reasons beside them go to `said`. None where something else stands."""
    if value in (None, "", [], {}):
        return []
    given = list(_given(value, said, depth))
    words = (name for name in given if re.search(r"[^\W\d_]", name) and not _NO_NAME.fullmatch(name))
    named = [name for name in words if not _says_nothing(name)]
    return named if named or (given and all(map(_says_nothing, given))) else None


def _says_nothing(name: str) -> bool:
    return _NOTHING.fullmatch(texts.normalise(name)) is not None


def _given(value: Any, said: list[str], depth: int) -> Iterator[str]:
    if depth > _DEPTH:
        return
    if isinstance(value, str):
        inner = _nested(value)
        if inner is None:
            yield from split(value, commas=depth == 0)
        else:
            yield from _given(inner, said, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _given(item, said, depth + 1)
    elif isinstance(value, dict):
        name, reason = _key(value, _NAME), _key(value, _REASONS)
        if name is None and value and len(_keys(value, _ROLES)) == len(value):
            for item in value.values():
                yield from _given(item, said, depth + 1)
        elif name is None:
            yield from map(texts.bare, value)
            said.extend(_points(value))
        else:
            yield from _given(value[name], said, depth + 1)
            said.extend(_points([value[reason]] if reason else []))


def _points(value: Any, depth: int = 0) -> list[str]:
    """The reasons in a JSON value: in one string, in a list, or under each disease."""
    if depth > _DEPTH:
        return []
    if isinstance(value, str):
        if (inner := _nested(value)) is not None:
            return _points(inner, depth + 1)
        if depth == 0:
            return texts.items(value.replace("|", "\n"))
        points = texts.numbered(value)
        if points and value.strip().startswith(points[0]):
            points = None  # A number in the midst of an item is the record's own.
        return [point for point in points or [texts.bare(value)] if point]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [point for item in value for point in _points(item, depth + 1)]
    return []


def _cut_off(body: str) -> bool:
    """Whether JSON was begun and not brought to an end, other than for want of closing brackets."""
    plain = body.translate(_WIDE).strip()
    start = plain.find("{") if "{" in plain else 0 if plain.startswith("[") else -1
    if start < 0 or plain.endswith("}"):
        return False
    outside = _STRING.sub(lambda string: '"' + string["end"], plain[start:]).rstrip()
    if outside.endswith(("}", "]", "```", "”", "'")):
        return False
    if outside.endswith('"'):
        # A list of diseases that is not closed may have been going to hold more of them.
        return outside.count('"') % 2 == 1 or ("[" in outside and "]" not in outside) or ":" not in outside
    return sum(map(outside.count, "{[")) > sum(map(outside.count, "}]"))


def _mended(body: str) -> Iterator[_Draft]:
    """What broken JSON says once it is mended."""
    fences = [inside for inside in _FENCE.findall(body) if "{" in inside]
    source = (fences[-1] if fences else body).translate(_WIDE)
    if source.lstrip().startswith('{\\"'):  # a string of JSON without its own quotes
        yield from _drafts(_loaded(source.replace('\\"', '"')))
    begin = _OPENING.search(source)
    if not begin or (begin[0] == "[" and (_LABEL.search(source[: begin.start()]) or _ASIDE.fullmatch(source.strip()))):
        return
    source = source[begin.start() :].removesuffix("```")
    source = source[: source.rfind("}") + 1] or source
    if len(source) > _MENDABLE or source.count("{") + source.count("[") > _BRACKETS:
        return
    source = re.sub(r"(?<=\w)'(?=s\b)", "’", source)
    source = re.sub(r"(?<=[{\[,:\s])‘|’(?=\s*[,:：，\]}])", "'", source)
    source = re.sub(r"(?<=[\"'”\]}])\s*[：，、；]\s*(?=[\"'“\[{])", lambda m: m[0].translate(_STRUCTURE), source)
    try:
        value = json_repair.loads(source)
    except (ValueError, RecursionError):
        return
    several = isinstance(value, list) and not source.startswith("[")
    for one in value if isinstance(value, list) and several else [value]:
        drafts = list(_drafts(one))
        if not any(_BRACKET.search(name) for draft in drafts for name in draft.diseases or ()):
            yield from drafts  # else a quote was mended in the wrong place


def _tagged(body: str) -> Iterator[_Draft]:
    """`<disease>…</disease><reason>…</reason>`; a stop string may have eaten the last closing tag."""
    body = re.sub(r"</?[A-Za-z]+>", lambda tag: tag[0].lower(), body)
    diseases = _first_inside(body, ("disease", "diseases", "diagnosis", "诊断", "疾病"))
    reasons = _first_inside(body, ("reason", "reasons", "evidence", "诊断依据", "依据"))
    if diseases:
        names = _names("\n".join(diseases), []) if any(map(str.strip, diseases)) else []
        yield _Draft(names, [point for part in reasons for point in texts.items(part)])


def _first_inside(body: str, tags: tuple[str, ...]) -> list[str]:
    """What stands within the first of these tags that is there: the inner ones come first."""
    return next((parts for tag in tags if (parts := list(_inside(body, tag)))), [])


def _inside(body: str, tag: str) -> Iterator[str]:
    begin = body.find(f"<{tag}>")
    while begin >= 0:
        begin += len(tag) + 2
        end = body.find(f"</{tag}>", begin)
        if end < 0:
            yield body[begin:].split("<", 1)[0]
            return
        yield body[begin:end]
        begin = body.find(f"<{tag}>", end)


def _table(body: str) -> Iterator[_Draft]:
    """A table in Markdown whose header names its columns."""
    lines = [
        [cell.strip(" *`") for cell in line.strip().strip("|").split("|")] for line in body.splitlines() if "|" in line
    ]
    if len(lines) < 3 or not all(re.fullmatch(r":?-+:?", cell) for cell in lines[1]):  # noqa: PLR2004  header, rule, row
        return
    rows = [dict(zip(lines[0], cells, strict=False)) for cells in lines[2:]]
    yield from _drafts(rows)


def _labelled(body: str) -> Iterator[_Draft]:
    """诊断：… 依据：… on lines of their own or one after another."""
    found = _LABEL.finditer(body)
    labels = [one for one in found if not one["other"] or not body[: one.start()].rpartition("\n")[2].strip()]
    ends = [*(label.start() for label in labels), len(body)][1:]
    for label, end in zip(labels, ends, strict=True):
        part = body[label.end() : end].replace("**", "").strip()
        listed = json_repair.loads(part) if part[:1] == "[" and len(part) < _MENDABLE else None
        if label["reason"]:
            yield _Draft(None, _points(listed) if listed else [point.removesuffix(".") for point in texts.items(part)])
        elif listed:
            yield _Draft(_names(listed, []))
        elif label["disease"]:
            yield from _bare(part.split("\n\n", 1)[0])


def _bare(body: str) -> Iterator[_Draft]:
    """Nothing but names."""
    if body[:1] == "{":
        value = _loaded(body)
        key = _key(value, _ANSWER) if isinstance(value, dict) else None
        inner = value[key] if key else ""
        body = "；".join(map(str, inner)) if isinstance(inner, list) else inner if isinstance(inner, str) else ""
    if not body or body[:1] in ("{", "["):
        return
    names = _names(body.strip().strip("\"'“”`*《》"), [])
    if names is None or len(names) > _MOST_BARE:
        return
    if not any(len(name) > _LONGEST_BARE or _PROSE.search(name) for name in names):
        yield _Draft(names)
