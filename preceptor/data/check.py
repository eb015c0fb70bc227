"""What is wrong with a case, and what is done about it; `leaks.py` says whether its text states the answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preceptor.core.records import Case, Consultation, Diagnosis
from preceptor.data.leaks import leaks
from preceptor.data.sections import DIAGNOSIS, kinds, sections, without

LONGEST = 100_000
"""Characters of the longest text that is taken for one patient's record."""
_QUOTED = 40
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")
_SAYS = re.compile(r"[^\s。.,，;；、\-—–/\\_|:：]")
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_LEADS = re.compile("[\u00c2-\u00f4]")
"""How Windows-1252 shows the bytes that begin a character of UTF-8."""
_HAN = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
_UTF8_HAN, _MENDED_SHARE = 3, 0.5
"""Bytes of a Chinese character in UTF-8; least share of a run's bytes that make sense as UTF-8."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a case: where, what, and what was done about it."""

    field: str
    reason: str
    action: Literal["dropped", "kept", "changed"]


def check(case: Case, drop_sections: Sequence[str] = ()) -> tuple[Case | None, list[Finding]]:
    """The case as it may be used, or None if it can't be, and what was found.

    Sections that state the answer are named in `meta["leaks"]` by their labels ("text" where there is none),
    unless `drop_sections`, labels in either language, takes them out. A text that changes takes the places of
    the gold's evidence with it, for they would no longer be right.
    """
    found: list[Finding] = []
    if reason := _useless(case.text):
        return None, [Finding("text", reason, "dropped")]
    text = _UNSEEN.sub("", case.text)
    if removed := len(case.text) - len(text):
        found.append(Finding("text", f"{removed} control or invisible characters", "changed"))
    if broken := _broken(case.text):
        found.append(Finding("text", f"{broken} characters come out of a wrong encoding", "kept"))
    if empty := [section.label for section in sections(text) if not _SAYS.search(section.body)]:
        found.append(Finding("text", f"empty sections: {', '.join(dict.fromkeys(empty))}", "kept"))
    text, labels, stated = _without_answer(text, case, drop_sections)
    found += stated
    if _useless(text):
        return None, [*found, Finding("text", "nothing is left of it without the dropped sections", "dropped")]
    meta = {key: value for key, value in case.meta.items() if key != "leaks"}
    changes: dict[str, Any] = {"text": text, "meta": {**meta, "leaks": labels} if labels else meta}
    if text != case.text and isinstance(case.gold, Diagnosis):
        changes["gold"] = case.gold.model_copy(update={"evidence": ()})
    return case.model_copy(update=changes), found


def _without_answer(text: str, case: Case, drop_sections: Sequence[str]) -> tuple[str, list[str], list[Finding]]:
    """The text without the unwanted sections, the labels of those that leak still, and what was found."""
    gold = case.gold.diseases if isinstance(case.gold, Diagnosis) else ()
    # A consultation's question may well say what the disease is: there it is no answer.
    before = [] if isinstance(case.gold, Consultation) else leaks(text, gold)
    unwanted = kinds(drop_sections)
    kept = text
    if DIAGNOSIS in unwanted:  # a diagnosis that is stated within another section is one too
        for leak in reversed([leak for leak in before if leak.labelled]):
            kept = kept[: leak.start] + kept[leak.end :]
    kept = without(kept, drop_sections)
    left = {leak.section for leak in (leaks(kept, gold) if before and kept != text else before)}
    found = []
    for leak in {leak.section: leak for leak in reversed(before)}.values():
        quote = " ".join(text[leak.start : leak.end][:_QUOTED].split())
        action: Literal["kept", "changed"] = "kept" if leak.section in left else "changed"
        found.append(Finding("text", f"the answer is stated in {leak.section}: {quote}", action))
    if len(kept) < len(text) and all(finding.action == "kept" for finding in found):
        found.append(Finding("text", f"dropped sections: {', '.join(drop_sections)}", "changed"))
    return kept, [label for label in dict.fromkeys(leak.section for leak in before) if label in left], found[::-1]


def _useless(text: str) -> str:
    """Why a text can't be used, or nothing."""
    if not text.strip():
        return "it is empty"
    if len(text) > LONGEST:
        return f"{len(text)} characters; a record has at most {LONGEST}"
    labelled = sections(text)
    rest = text[: labelled[0].start] if labelled else text
    if not any(map(_SAYS.search, [_UNSEEN.sub("", rest), *(section.body for section in labelled)])):
        return "it holds nothing but empty sections" if labelled else "it holds no words"
    if 2 * (broken := _broken(text)) > len("".join(text.split())):
        return f"{broken} of its characters come out of a wrong encoding"
    return ""


def _broken(text: str) -> int:
    """Characters that are a decoder's mark of failure, or UTF-8 that was read as GBK or as Windows-1252."""
    runs = _FOREIGN.findall(text.replace("\ufffd", " "))
    return text.count("\ufffd") + sum(len(run) for run in runs if _from_gbk(run) or _from_latin(run))


def _from_gbk(run: str) -> bool:
    """Whether a run's bytes in GBK are UTF-8 for fewer Chinese characters, two at least: one is chance."""
    octets = run.encode("gbk", errors="ignore")
    mended = _HAN.findall(octets.decode("utf-8", errors="ignore"))
    return len(mended) > 1 and _UTF8_HAN * len(mended) > _MENDED_SHARE * len(octets)


def _from_latin(run: str) -> bool:
    """Whether a run's bytes in Windows-1252 are UTF-8 for anything."""
    if not _LEADS.search(run):
        return False
    octets = b"".join(map(_latin, run))
    mended = octets.decode("utf-8", errors="ignore")
    return 0 < len(mended) < len(run) and len(mended.encode()) > _MENDED_SHARE * len(octets)


def _latin(character: str) -> bytes:
    """The byte that Windows-1252 shows as this character; one that is never UTF-8 if there is none."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return bytes([ord(character)]) if ord(character) < 0x100 else b"\xff"  # noqa: PLR2004  the bytes it leaves out
