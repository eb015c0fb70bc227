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
    r"(?:final|primary|predicted)?(?:diseases?|diagnos[ei]s)(?:names?)?"
    r"|(?:初步|最终|临床|主要)?(?:诊断|疾病)(?:名称|结果|结论|诊断)?|病名"
)
_REASONS = re.compile(
    r"reasons?|(?:supporting)?evidences?|rationale|justification|explanation|(?:diagnostic)?basis"
    r"|(?:诊断)?(?:依据|理由|原因)|证据"
)
_NAME = re.compile(rf"name|名称|{_DISEASES.pattern}")
_NOTHING = re.compile(
    r"无|暂无|未知|不详|(?:不|不能|无法)(?:明确)?(?:确定|诊断|判断)|无明确诊断|信息不足|none|unknown|n/?a|null|nil"
    r"|undetermined|uncertain|abstain|no diagnosis|cannot determine|insufficient (?:information|data)"
)
"""Words that stand where a name should, and say that there is none: an abstention."""

_THINK_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"```[ \t]*\w*\s(.*?)```", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?P<end>"?)', re.DOTALL)
_OPENING = re.compile(r"[{\[]")
_WIDE = str.maketrans("｛｝［］", "{}[]")
_LABEL = re.compile(
    r"(?:^[ \t#>*\-]*|(?<=[。；;.，,])[ \t]*)[*【\[]{0,2}(?:"
    r"(?P<reason>诊断依据|诊断理由|依据|理由|原因|证据"
    r"|reasons?|(?:supporting )?evidence|rationale|justification)"
    r"|(?P<disease>(?:初步|最终|临床|主要|可能的?|入院|出院)?(?:诊断|疾病)(?:结果|名称|结论)?"
    r"|(?:the )?(?:final |primary |most likely )?(?:diagnos[ei]s|diseases?))"
    r")[*】\]]{0,2}(?:[ \t]*[:：][*]{0,2}|(?<=诊断)[为是]|(?<=is) is (?=\w))",
    re.IGNORECASE | re.MULTILINE,
)
_PROSE = re.compile(
    r"[。！!{}<>=:：\"]|[?？](?=.)|我|您|请|患者|病人|建议|需要|抱歉|因为|所以|可以|应该|根据"
    r"|\b(?:i|you|we|my|please|patient|cannot|can't|sorry|should|because|is|are|was|would|based|this|it|know)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\W*(?:i(?:'|’)?m (?:sorry|unable)|i am (?:sorry|unable)|sorry|i can(?:not|'t|’t)|as an ai"
    r"|(?:非常|很)?抱歉|对不起|我(?:无法|不能)|作为(?:一个|一名)?(?:ai|人工智能))",
    re.IGNORECASE,
)
_ATTEMPTS = 200
"""Places at which JSON is tried before the reply counts as noise."""
_MENDABLE, _BRACKETS = 10_000, 200
"""Characters and brackets of what is worth mending; the mender's time grows with their product."""
_DEPTH = 4
"""Levels of wrapping and of JSON within strings."""
_MOST_BARE, _LONGEST_BARE = 12, 80


def parse(text: str, finish: str = "stop") -> Parsed:
    """The diagnosis that a reply gives, or why it gives none. `finish` is how the reply ended."""
    if finish == "refusal":
        return Parsed(outcome=Outcome.REFUSED, detail="the endpoint says that the model refused")
    body, thinking = _without_thinking(text)
    if not body:
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
    refused = _REFUSAL.match(body)
    forms = {"mended JSON": _mended, "tags": _tagged, "labelled text": _labelled}
    for form, read in (forms if refused else {**forms, "bare names": _bare}).items():
        if output := _diagnosis(read(body)):
            return Parsed(outcome=Outcome.REPAIRED, output=output, detail=form)
    if refused:
        return Parsed(outcome=Outcome.REFUSED, detail="the reply declines to answer")
    return Parsed(outcome=Outcome.UNPARSED, detail="the reply names diseases in no known form")


def _without_thinking(text: str) -> tuple[str, bool]:
    """The reply without its thinking, and whether it ends in the midst of thinking.

    Chat templates that open the thinking themselves leave only the closing tag in the reply.
    """
    opened = _THINK_OPEN.search(text)
    before = text[: opened.start()] if opened else ""
    after = None
    for closed in _THINK_CLOSE.finditer(text):
        after = closed.end()
    if after is None:
        return (before if opened else text).strip(), opened is not None
    rest = text[after:]
    if again := _THINK_OPEN.search(rest):
        return (rest[: again.start()] or before).strip(), True
    return (rest.strip() or before.strip()), False


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
        disease = _key(value, _DISEASES)
        reason = _key(value, _REASONS)
        if disease is None and reason is None:
            for inner in value.values():
                yield from _drafts(inner, depth + 1)
            return
        said: list[str] = []
        diseases = None if disease is None else _names(value[disease], said)
        reasons = (said or None) if reason is None else [*said, *_points(value[reason])]
        if disease is None or diseases is not None:
            yield _Draft(diseases, reasons)


def _key(value: dict[str, Any], names: re.Pattern[str]) -> str | None:
    """The first key that is one of `names`, whatever its case, width and separators."""
    plain = ((key, re.sub(r"[\W_]", "", texts.normalise(key))) for key in value)
    return next((key for key, name in plain if names.fullmatch(name)), None)


def _nested(text: str) -> Any:
    """JSON within a string, where line breaks have often lost their escapes."""
    return _loaded(text, strict=False) if text.lstrip()[:1] in ("{", "[", '"') else None


def _names(value: Any, said: list[str], depth: int = 0) -> list[str] | None:
    """The diseases in a JSON value; reasons beside them go to `said`. None where something else stands."""
    if value in (None, "", [], {}):
        return []
    given = list(_given(value, said, depth))
    named = [name for name in given if re.search(r"[^\W\d_]", name) and not _says_nothing(name)]
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
        if name is None:
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
            return texts.items(value)
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
    start = body.translate(_WIDE).find("{")
    if start < 0:
        return False
    outside = _STRING.sub(lambda string: '"' + string["end"], body[start:]).rstrip()
    if outside.endswith(("}", "]", "```", "”", "'", "｝", "］")):
        return False
    if outside.endswith('"'):
        return outside.count('"') % 2 == 1
    return sum(map(outside.count, "{[")) > sum(map(outside.count, "}]"))


def _mended(body: str) -> Iterator[_Draft]:
    """What broken JSON says once it is mended."""
    fences = [inside for inside in _FENCE.findall(body) if "{" in inside]
    source = (fences[-1] if fences else body).translate(_WIDE)
    begin = _OPENING.search(source)
    if not begin:
        return
    source = source[begin.start() :].removesuffix("```")
    source = source[: source.rfind("}") + 1] or source
    if len(source) > _MENDABLE or source.count("{") + source.count("[") > _BRACKETS:
        return
    source = re.sub(r"(?<=\w)'(?=s\b)", "’", source)
    try:
        value = json_repair.loads(source)
    except (ValueError, RecursionError):
        return
    several = isinstance(value, list) and not source.startswith("[")
    for one in value if isinstance(value, list) and several else [value]:
        yield from _drafts(one)


def _tagged(body: str) -> Iterator[_Draft]:
    """`<disease>…</disease><reason>…</reason>`; a stop string may have eaten the last closing tag."""
    diseases = [part for tag in ("disease", "diseases", "diagnosis", "诊断", "疾病") for part in _inside(body, tag)]
    reasons = [part for tag in ("reason", "reasons", "evidence", "诊断依据", "依据") for part in _inside(body, tag)]
    if diseases:
        names = _names("\n".join(diseases), []) if any(map(str.strip, diseases)) else []
        yield _Draft(names, [point for part in reasons for point in texts.items(part)])


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


def _labelled(body: str) -> Iterator[_Draft]:
    """诊断：… 依据：… on lines of their own or one after another."""
    labels = list(_LABEL.finditer(body))
    ends = [*(label.start() for label in labels), len(body)][1:]
    for label, end in zip(labels, ends, strict=True):
        part = body[label.end() : end].replace("**", "").strip()
        if label["reason"]:
            yield _Draft(None, texts.items(part))
        else:
            yield from _bare(part.split("\n\n", 1)[0])


def _bare(body: str) -> Iterator[_Draft]:
    """Nothing but names."""
    if body[:1] in ("{", "["):
        return
    names = _names(body.strip().strip("\"'“”`*"), [])
    if names is None or len(names) > _MOST_BARE:
        return
    if not any(len(name) > _LONGEST_BARE or _PROSE.search(name) for name in names):
        yield _Draft(names)
