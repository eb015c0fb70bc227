"""Reads a diagnosis out of whatever a model, a competition file or a person wrote.

Strict JSON comes first, wherever it stands in the reply: that is clean. Everything else that can be read
without guessing (mended JSON, tags, labelled lines, bare names) counts as repaired. A reply that was cut off
is never completed, for half a list of diseases is another answer. Work is bounded, whatever the reply.
"""

import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

import json_repair
from pydantic import Field

from preceptor.core import text as texts
from preceptor.core.records import Diagnosis, Record
from preceptor.tasks.values import SURE, Draft, drafts, key, listed, loaded, named, points, probabilities
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
    stated: dict[str, float] = Field(default_factory=dict)
    """The probability that the reply itself states of a disease, where it states one that can be read."""
    detail: str = ""


_ONE = re.compile(r"disease|diagnosis|疾病|诊断|疾病名称")
_ANSWER = re.compile(r"(?:final)?answer|prediction|output|result|response|答案|预测|结果")
"""Keys of an object that may hold nothing but names."""
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
    r"|(?P<other>鉴别诊断|治疗(?:方案|建议)?|处理|建议|说明|备注|置信度|概率|可能性|分析"
    r"|(?:differential|other) diagnos[ei]s|treatment|plan|recommendations?|note|confidence|probability"
    r"|icd(?:-?10)?(?: codes?)?|analysis)"
    r")(?:(?P<close>[*_]{1,3}|[】\]」』>》\"'”])?[ \t]*(?:[为是]?[:：=][*_]{0,3}|(?<=诊断)[为是]|(?<=is) is (?=\w))"
    r"|(?(open)[*_】\]」』]{1,3}|[ \t]*(?=\n)))",
    re.IGNORECASE | re.MULTILINE,
)
_PROSE = re.compile(
    r"[。！!{}<>=:：\"]|[?？](?=.)|我|您|请|患者|病人|建议|需要|抱歉|因为|所以|可以|应该|根据"
    r"|\b(?:i|you|we|my|please|patient|cannot|can't|sorry|should|because|is|are|was|would|based|this|it|know)\b",
    re.IGNORECASE,
)
_ATTEMPTS = 200
"""Places at which JSON is tried before the reply counts as noise."""
_MENDABLE, _BRACKETS = 10_000, 200
"""Characters and brackets of what is worth mending; the mender's time grows with their product."""
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
    if answer := _answer(_strict(body)):
        return _parsed(Outcome.CLEAN, answer)
    if finish == "length" or thinking or _cut_off(body):
        return Parsed(outcome=Outcome.TRUNCATED, detail="the reply ends before its JSON does")
    return _repaired(body)


def _repaired(body: str) -> Parsed:
    """What a reply says in any form but strict JSON."""
    refused = refuses(body)
    forms = {"mended JSON": _mended, "tags": _tagged, "table": _table, "labelled text": _labelled}
    for form, read in (forms if refused else {**forms, "bare names": _bare}).items():
        if answer := _answer(read(body)):
            return _parsed(Outcome.REPAIRED, answer, form)
    if refused:
        return Parsed(outcome=Outcome.REFUSED, detail="the reply declines to answer")
    return Parsed(outcome=Outcome.UNPARSED, detail="the reply names diseases in no known form")


def _parsed(outcome: Outcome, answer: Draft, detail: str = "") -> Parsed:
    output = Diagnosis(diseases=tuple(answer.diseases or ()), reason=tuple(answer.reason or ()))
    return Parsed(outcome=outcome, output=output, stated=probabilities(answer), detail=detail)


def _answer(said: Iterable[Draft]) -> Draft | None:
    """The last answer given, since models correct themselves; halves in two objects belong together."""
    answer = Draft()
    for draft in said:
        if draft.diseases is not None:
            stated = draft.stated or (answer.stated if answer.diseases is None else {})
            answer = Draft(draft.diseases, draft.reason if draft.reason is not None else answer.reason, stated)
        else:
            answer.reason = answer.reason or draft.reason
            answer.stated = answer.stated or draft.stated
    return None if answer.diseases is None else answer


def _strict(body: str) -> Iterator[Draft]:
    """What the JSON values of a reply say, as they are."""
    fence = _FENCE.fullmatch(body)
    whole = loaded((fence[1] if fence else body).strip())
    if whole is not None:
        yield from drafts(whole)
        return
    if several := _lines(body):
        yield from drafts(several)
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
            yield from drafts(value)


def _lines(body: str) -> list[Any]:
    """The objects of JSON lines that name one disease each; of anything else, none."""
    lines = [line.strip().removesuffix(",") for line in body.splitlines() if line.strip()]
    values = [loaded(line) for line in lines[:_ATTEMPTS]] if len(lines) > 1 and lines[0][:1] == "{" else []
    one = (isinstance(v, dict) and isinstance(v.get(key(v, _ONE) or ""), str) for v in values)
    return values if all(one) else []


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


def _mended(body: str) -> Iterator[Draft]:
    """What broken JSON says once it is mended."""
    fences = [inside for inside in _FENCE.findall(body) if "{" in inside]
    source = (fences[-1] if fences else body).translate(_WIDE)
    if source.lstrip().startswith('{\\"'):  # a string of JSON without its own quotes
        yield from drafts(loaded(source.replace('\\"', '"')))
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
        said = list(drafts(one))
        if not any(_BRACKET.search(name) for draft in said for name in draft.diseases or ()):
            yield from said  # else a quote was mended in the wrong place


def _tagged(body: str) -> Iterator[Draft]:
    """`<disease>…</disease><reason>…</reason>`; a stop string may have eaten the last closing tag."""
    body = re.sub(r"</?[A-Za-z]+>", lambda tag: tag[0].lower(), body)
    diseases = _first_inside(body, ("disease", "diseases", "diagnosis", "诊断", "疾病"))
    reasons = _first_inside(body, ("reason", "reasons", "evidence", "诊断依据", "依据"))
    if diseases:
        names = named("\n".join(diseases)).diseases if any(map(str.strip, diseases)) else []
        yield Draft(names, [point for part in reasons for point in texts.items(part)])


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


def _table(body: str) -> Iterator[Draft]:
    """A table in Markdown whose header names its columns."""
    lines = [
        [cell.strip(" *`") for cell in line.strip().strip("|").split("|")] for line in body.splitlines() if "|" in line
    ]
    if len(lines) < 3 or not all(re.fullmatch(r":?-+:?", cell) for cell in lines[1]):  # noqa: PLR2004  header, rule, row
        return
    rows = [dict(zip(lines[0], cells, strict=False)) for cells in lines[2:]]
    yield from drafts(rows)


def _labelled(body: str) -> Iterator[Draft]:
    """诊断：… 依据：… on lines of their own or one after another."""
    found = _LABEL.finditer(body)
    labels = [one for one in found if not one["other"] or not body[: one.start()].rpartition("\n")[2].strip()]
    ends = [*(label.start() for label in labels), len(body)][1:]
    for label, end in zip(labels, ends, strict=True):
        part = body[label.end() : end].replace("**", "").strip()
        value = json_repair.loads(part) if part[:1] == "[" and len(part) < _MENDABLE else None
        if label["reason"]:
            yield Draft(None, points(value) if value else [point.removesuffix(".") for point in texts.items(part)])
        elif label["other"]:
            if SURE.fullmatch(label["other"].lower()):
                yield Draft(stated=listed(part.split("\n\n", 1)[0]))
        elif value:
            yield named(value)
        else:
            yield from _bare(part.split("\n\n", 1)[0])


def _bare(body: str) -> Iterator[Draft]:
    """Nothing but names."""
    if body[:1] == "{":
        value = loaded(body)
        answer = key(value, _ANSWER) if isinstance(value, dict) else None
        inner = value[answer] if answer else ""
        body = "；".join(map(str, inner)) if isinstance(inner, list) else inner if isinstance(inner, str) else ""
    if not body or body[:1] in ("{", "["):
        return
    names = named(body.strip().strip("\"'“”`*《》")).diseases
    if names is None or len(names) > _MOST_BARE:
        return
    if not any(len(name) > _LONGEST_BARE or _PROSE.search(name) for name in names):
        yield Draft(names)
