"""The labelled sections of a record, and what is left of it once labels and boilerplate are gone.

A label counts at the start of a line, in either language and width: before a colon, a tab or a table's bar, or
where it is all of the line. Within a line it counts where it can't mean anything else: a Chinese one of three
characters or more that nothing denies (否认过敏史), any other only behind a mark or a wide space. What states a
diagnosis is a section of its own at the start of a line; within a line only 初步诊断 is, since 诊断: and 出院诊断:
also stand inside other sections.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

from preceptor.core.text import normalise

DIAGNOSIS = "diagnosis"
_NAMES: dict[str, str] = {
    "sex": r"性[ \t\u3000]*别|sex|gender",
    "age": r"年[ \t\u3000]*龄|age",
    "chief_complaint": r"主[ \t\u3000]*诉|chief complaint|presenting complaint|reason for visit|cc",
    "present_illness": "现病史|history of (?:the )?present(?:ing)? (?:illness|complaint)|present illness|hpi",
    "past_history": "既往史|既往病史|手术史|外伤史|past (?:medical |surgical )?history|medical history|pmh|psh",
    "medications": "用药史|药物史|目前用药|(?:current |home )?medications|drug history",
    "personal_history": "个人史|吸烟史|饮酒史|personal history|social history",
    "allergies": "过敏史|药物过敏史|allerg(?:y history|ies)",
    "marital_history": (
        "婚育史|婚姻史|生育史|月经史|月经婚育史|marital history|(?:obstetric|gynaecological|gynecological) history"
    ),
    "family_history": "家族史|family history|fhx?",
    "epidemiology": "流行病史|流行病学史|epidemiolog(?:y|ical history)|travel history",
    "review_of_systems": "系统回顾|review of systems|ros",
    "vital_signs": "生命体征|vital signs|vitals",
    "examination": (
        "体格检查|专科检查|专科情况|查体|(?:physical |clinical )?exam(?:ination)?(?: findings)?|on examination"
    ),
    "investigations": (
        "辅助检查|实验室检查|影像学检查|检验检查|investigations?|laborator(?:y results|y findings|y data|ies)|labs"
        "|imaging(?: findings)?|test results|studies"
    ),
    DIAGNOSIS: (
        "(?:初步|入院|出院|门诊|急诊|临床|目前|最终|最后|主要|修正|补充|中医|西医|确定|疾病)?"
        r"诊[ \t\u3000]*断(?:意见|结果|结论|印象|内容|名称)?"
        "|诊断考虑|疾病名称|病名|(?:初步|临床)?印象|拟诊|初诊"
        "|(?:(?:final|working|provisional|primary|principal|main|initial|preliminary|clinical|admission|admitting"
        "|admit|discharge|presumptive|most likely) )?(?:diagnos[ei]s|dx)"
        "|(?:clinical )?impression|imp|assessment(?: ?(?:and|&|/) ?plan)?|a/p"
    ),
    "plan": "处理|处置|处理意见|诊疗计划|治疗|治疗意见|医嘱|注意事项|plan|treatment|recommendations?",
}
_LABEL = re.compile(
    r"(?<![A-Za-z])(?=[#*>•·▪|\"\-【\[A-Za-z疾病性年主现既手外用药目个吸饮过婚生月家流系体专查辅实影检初入出门急临最修补中西确诊印拟处治医注])"
    r"(?:(?:^|(?<=\n))[#*>•·▪|\"\-]+[ \t]*)?(?P<open>[【\[])?(?P<name>"
    + "|".join(f"(?P<{kind}>{names})" for kind, names in _NAMES.items())
    + r")(?(open)[】\]][ \t]*[:：]?|(?:\*\*|\")?[ \t]*(?:[(（][^()（）\n]{1,20}[)）][ \t]*)?"
    r"(?:[:：](?:\*\*)?|(?P<alone>\t|\||(?=\n|$)|(?<=.{4})[ \u3000]+(?:[-–—][ ])?(?=\S))))",
    re.IGNORECASE,
)
_SPACED = re.compile(r"\S{2,}诊断|.+\s(?:diagnos[ei]s|dx)", re.IGNORECASE)
"""Labels of a diagnosis that may be parted from it by a space alone: 门诊诊断 急性咽炎."""
_LINE_START = re.compile(r"(?:^|\n)[\s#>*•·▪\-|\"]*(?:[(（]?[一二三四五六七八九十\d]{1,2}[、.．)）]\s*)?$")
_BEHIND_MARK = re.compile(r"(?:[。；;！!？?】|]|[.](?=\s)|\s\s|[，,](?=\s?))\s*$")
_NEVER_BEHIND = re.compile(r"(?:无|否认|有|及|和|与|、|明显|特殊|of|no|and)\s*$", re.IGNORECASE)
_WITHIN_A_LINE = re.compile(r"初步诊断|初步印象")
_LEAD, _TAIL = r"[ \t#>*•·▪\-【\[]*", r"[】\]*]*[ \t]*(?:[:：\t]|(?=\n|$))"
_ANY_LABEL = re.compile(r"(?<=\n)[^\n:：，。；,;]{1,20}[:：]")
_AMBIGUOUS = frozenset({DIAGNOSIS, "plan"})
_LONG_NAME = 3

_SAMPLE = 50_000
_LEAST_TEXTS, _LEAST_SHARE, _LEAST_LENGTH = 5, 0.01, 10
_CLAUSE = re.compile(r"[。；;！!？?，,\n]|\.(?=\s)")
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_AGE = re.compile(
    r"(?<![\d.])\d{1,3}(?:\.\d)?\s*(?:周?岁|个?月龄|[- ]?years?[- ]old|[- ]?y/?o\b|[- ]?yrs?\b)", re.IGNORECASE
)


@dataclass(frozen=True)
class Section:
    """A labelled part of a record: `text[start:end]` is all of it, label included."""

    label: str
    """As the record writes it."""
    kind: str
    """The same for every name of it in both languages: 查体 and Examination are `examination`."""
    body: str
    """What follows the label, without the spaces around it; it may be empty."""
    start: int
    end: int


@lru_cache(maxsize=16)  # several rules ask about one record in a row
def sections(text: str) -> tuple[Section, ...]:
    """The labelled sections in the record's order, empty ones too; each ends where the next one starts."""
    found = [match for match in _LABEL.finditer(text) if _stands(text, match)]
    ends = [*(match.start() for match in found), len(text)][1:]
    return tuple(
        Section(match["name"], _kind(match), text[match.end() : end].strip(), match.start(), end)
        for match, end in zip(found, ends, strict=True)
    )


def kinds(labels: Iterable[str]) -> frozenset[str]:
    """The kinds that labels of either language stand for; a kind stands for itself, an unknown label too."""
    found = ((label, _LABEL.fullmatch(f"{label.strip()}:")) for label in labels)
    return frozenset(_kind(match) if match else label.strip().casefold() for label, match in found)


def unknown(labels: Iterable[str]) -> list[str]:
    """The labels that are no kind of section that is known here: they must stand in a record to mean anything."""
    return [label for label in labels if not kinds([label]) <= _NAMES.keys()]


def without(text: str, labels: Collection[str]) -> str:
    """The record without the sections of these labels, by whatever name it calls them.

    A label that is none of ours counts as one where a line starts with it, up to the next section or label.
    """
    unwanted = kinds(labels)
    found = sections(text)
    cut = [(section.start, section.end) for section in found if section.kind in unwanted]
    for label in unwanted - _NAMES.keys():
        for match in re.finditer(rf"(?:^|(?<=\n)){_LEAD}{re.escape(label)}{_TAIL}", text, re.IGNORECASE):
            ends = [section.start for section in found if section.start >= match.end()]
            following = _ANY_LABEL.search(text, match.end())
            cut.append((match.start(), min([*ends, following.start() if following else len(text)])))
    parts, start = [], 0
    for first, last in sorted(cut):
        parts.append(text[start : max(start, first)])
        start = max(start, last)
    return "".join([*parts, text[start:]]).strip() if parts else text


def boilerplate(texts: Iterable[str]) -> frozenset[str]:
    """The clauses that stand in at least 5 and at least 1 % of the different texts, of the first 50,000 at most.

    A clause lies between marks and is compared by its letters alone, so its numbers may differ. It has at
    least 10 characters, of which a Latin letter counts a third.
    """
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    for text in islice(texts, _SAMPLE):
        if (key := hash(text)) not in seen:
            seen.add(key)
            counts.update({letters for clause in _clauses(text) if (letters := _letters(clause))})
    least = max(_LEAST_TEXTS, _LEAST_SHARE * len(seen))
    return frozenset(clause for clause, number in counts.items() if number >= least)


def stripped(text: str, boilerplate: Collection[str]) -> str:
    """What tells a record from others: without labels, sex, age, boilerplate, white space, width and case."""
    kept = (clause for clause in _clauses(text) if _letters(clause) not in boilerplate)
    return "".join(normalise("".join(kept)).split())


def variants(text: str) -> Iterator[int]:
    """Keys of which two texts share one if they differ in one clause at most, and not in the first.

    For texts of boilerplate alone, of which copies make their own; the first clause is the complaint.
    """
    clauses = [normalise(clause).strip() for clause in _clauses(text)]
    yield hash(tuple(clauses))
    yield from (hash((*clauses[:place], *clauses[place + 1 :])) for place in range(1, len(clauses)))


def _kind(match: re.Match[str]) -> str:
    return next(kind for kind in _NAMES if match[kind])


def _stands(text: str, match: re.Match[str]) -> bool:
    """Whether a label is one, where it stands."""
    before = text[max(0, match.start() - 40) : match.start()]
    if (parted := match["alone"]) is not None:
        spaced = parted.strip("\t|") and not _SPACED.fullmatch(match["name"])
        return not spaced and bool(_LINE_START.search(before))
    if match.start() <= len(before) and not before.strip():
        return True
    if _LINE_START.search(before):
        return True
    name, kind = match["name"], _kind(match)
    if kind in _AMBIGUOUS and not _WITHIN_A_LINE.fullmatch(name):
        return False
    if _NEVER_BEHIND.search(before):
        return False
    chinese = not name.isascii()
    return bool(match["open"] or (chinese and len(name) >= _LONG_NAME) or _BEHIND_MARK.search(before))


def _clauses(text: str) -> Iterator[str]:
    """The text between marks, marks included, without labels, sex and age."""
    found = sections(text)
    start = found[0].start if found else len(text)
    bodies = (section.body + "\n" for section in found if section.kind not in ("sex", "age"))
    for part in (text[:start], *bodies):
        plain = _AGE.sub("", part)
        cuts = [0, *(match.end() for match in _CLAUSE.finditer(plain)), len(plain)]
        yield from (plain[first:last] for first, last in pairwise(cuts) if first < last)


def _letters(clause: str) -> str:
    """What clauses are compared by; nothing for one that is too short to be boilerplate."""
    letters = _NOT_LETTERS.sub("", normalise(clause))
    latin = sum(map(str.isascii, letters))
    return letters if len(letters) - latin + latin / 3 >= _LEAST_LENGTH else ""
