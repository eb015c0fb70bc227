"""Where a quotation stands in a record, and whether the record affirms or denies what it says there.

Denial is read by clause, with word lists and no grammar: a cue reaches forward to the end of its clause or
list, or back over the words before it in the same clause. Phrases that only look like denial
(无明显诱因, 无力, "no improvement") are no cues.
"""

import re
from collections import Counter
from collections.abc import Iterator

from rapidfuzz import fuzz
from rapidfuzz.distance import Indel

from preceptor.core.records import Polarity
from preceptor.core.text import fold, normalise

SIMILAR = 0.8
"""Least share of characters that a quotation and its passage have in common, in order."""

_FALSE_CUE = r"""
    无(?:明显|特殊)?(?:诱因|原因) | 无(?:力|法|意(?!识)|菌|名|奈|尿(?!\w)|痛性|症状性|规律|精打采)
    | 无(?:明显|显著)?(?:好转|缓解|改善|减轻|变化) | 没有?(?:明显)?(?:好转|缓解|改善|减轻)
    | (?:不|未|待|难以?|无法|不能|不可)(?:完全)?(?:除外|排除) | (?:除外|排除)性
    | \b(?:no|without)\s+(?:(?:significant|any|apparent|obvious|clear)\s+)?
      (?:improvement|relief|change|effect|response|difficulty|appetite|energy|strength|cause|trigger)\b
    | \bno(?:t\s+only|\s+doubt)\b
    | \b(?:cannot|can't|could\s+not|not)\s+(?:be\s+)?(?:excluded?|ruled?\s+out)\b
"""
"""What looks like denial and is none."""
_CUE = re.compile(
    rf"""(?:(?P<false>{_FALSE_CUE})
    | (?P<listing>否认 | \b(?:denie[sd]|deny(?:ing)?|negative\s+for|free\s+of)\b)
    | (?P<beside>不伴有?|无伴 | \bwithout\b)
    | 未(?:见|闻及?|触及|及|扪及|查及|查见|探及|引出|发现|出现|诉|提示|显示)
    | 没有 | 没(?=[发咳头胸腹恶呕吐拉痛喘])
    | (?<!有)无 | (?:除外|排除)(?=\w) | 不(?=发热|发烧|[咳痛吐喘晕]) | 不再 | 不考虑 | 不支持
    | \b(?:no|nor|negative(?=\s+\w)|absence\s+of|never\s+(?:had|has))\b
    | \b(?:do|does|did|has|have|had)(?:\s+not|n't)
      (?:\s+(?:have|had|report|complain\s+of|experience|show|any))*\b
    | \b(?:is|was|are|were)\s+not\b
    )\s*[:：]?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_CUE_BEHIND = re.compile(
    r"""未(?:引出|触及|闻及?|见|及|扪及|查及|发现|出现)(?=\s*(?:$|、)) | 阴性 | [(（][-－—一][)）]
    | [均皆都全也亦](?:无(?!明显)|未见|否认|阴性) | (?<![不未待能可])(?:已?排除|已?除外)$
    | (?<!not\sbe\s)(?<!not\s)\b(?:negative|absent|denied|ruled\s+out|excluded
      |not\s+(?:seen|present|found|noted|detected|heard|palpable))\b
      (?=\s*(?:$|\b(?:on|in|at|by)\b))""",
    re.IGNORECASE | re.VERBOSE,
)
_STOP = re.compile(
    r"""但 | 然而 | 却 | 不过 | 而(?=[有见出伴]) | 仅 | 只有 | (?<![不无未])伴
    | (?<![没未])有 | 出现 | 可见 | [:：]
    | \b(?:but|however|although|though|except|yet|with|has|have|had|reports?|presents?|complains?
      |develop(?:s|ed)|because|due|then|now)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Where a scope ends within a clause."""
_SENTENCE_END = re.compile(r"[。；;！？!?\n]|\.(?=\s|$)")
_COMMA = re.compile(r"，|,(?!\d)|(?:^|(?<=[一-鿿]))[ \t]+(?=[一-鿿]|$)")
_CLOSING = re.compile(r"\b(?:and|or|nor)\b", re.IGNORECASE)
_LIST_END = re.compile(r"(?:等|史)(?:症状|不适|表现|疾病|传染病|慢性病|病|史)*$")
_TELLS = re.compile(
    r"[\d天日周月年]|\b(?:for|since|after|before|on|is|was|are|were|started|began|one|two|three|days?|weeks?)\b",
    re.IGNORECASE,
)
"""What a mere item of a list doesn't hold: how long, since when, a verb."""
_ITEM_WORDS, _ITEM_CHARACTERS = 4, 40
_ASSERTS = re.compile(r"[热痛胀咳嗽吐泻晕慌闷喘肿汗痒麻痰软但伴有]|[咯呕便尿出]血|\b(?:but|with)\b", re.IGNORECASE)
"""What before a cue shows that something else was said first."""
_REACH = 200
"""Characters of context on either side that can bear on a passage."""

_SHORTEST, _LONGEST = 5, 1_000
"""Characters of a quotation that needn't be exact."""
_FACT = re.compile(
    r"""\d+(?:[.,/:~-]\d+)*(?:[a-zμ%‰°/^]+
      | \s?(?:mg|g|kg|ml|l|mmhg|mmol/l|bpm|°c|hours?|days?|weeks?|months?|years?)\b
      | \s?[天日周月年岁次级期度个克]+)?
    | [左右双上下] | 阳性 | 阴性 | 升高 | 增高 | 增多 | 降低 | 下降 | 减少 | 减低
    | 正常 | 异常 | 加重 | 减轻 | 缓解
    | 无 | 未 | 否认 | 没有? | 不 | 除外 | 排除
    | \b(?:left|right|bilateral|upper|lower|positive|negative|high|low|raised|elevated|increased|reduced
      |decreased|normal|abnormal|worse|better|no|not|denie[sd]|without|never)\b""",
    re.VERBOSE,
)
"""What must be equal in a passage that is only alike."""
_WRAP = " \t\r\n\"'“”‘’「」『』《》…。.；;，,、!！"
_INSIDE_NUMBER = "./,:~-"


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where a quotation stands in a record, or None; the first place if there are several."""
    return next(places(quote, text), None)


def places(quote: str, text: str) -> Iterator[tuple[int, int]]:
    """Every place where a quotation is exact but for width, case and spaces; failing that, one much like it.

    A passage that is only alike must state the same facts: numbers with units, sides, directions, denials.
    A quotation never begins or ends inside a number or a Latin word of the record.
    """
    quote = quote.strip(_WRAP)
    if not re.search(r"\w", quote):
        return
    exact = [span for span in _finds(quote, text) if _whole(text, *span)]
    if not exact:
        needle, hay = fold(quote).text, fold(text)
        folded = (hay.original(*span) for span in _finds(needle, hay.text))
        exact = [span for span in folded if _whole(text, *span)]
    if exact:
        yield from exact
    elif near := _near(needle, hay.text):
        span = _grown(text, *hay.original(*near))
        passage = text[slice(*span)]
        alike = Indel.normalized_similarity(needle, fold(passage).text) >= SIMILAR
        if alike and _facts(quote) == _facts(passage):
            yield span


def _finds(needle: str, hay: str) -> Iterator[tuple[int, int]]:
    start = hay.find(needle) if needle else -1
    while start >= 0:
        yield start, start + len(needle)
        start = hay.find(needle, start + len(needle))


def polarity(text: str, start: int, end: int) -> Polarity:
    """What `text` says of its passage from `start` to `end`; of the head of it, if it has several clauses.

    A passage that holds its own denial ("无发热") is denied.
    """
    return Polarity.NEGATED if denied(text, start, end) or _denies_itself(text[start:end]) else Polarity.AFFIRMED


def denied(text: str, start: int, end: int) -> bool:
    """Whether words outside the passage deny it."""
    first = _sentence_start(text, start)
    match = _SENTENCE_END.search(text, end, min(len(text), end + _REACH))
    last = match.start() if match else min(len(text), end + _REACH)
    sentence, start, end = text[first:last], start - first, min(end, last) - first
    cue = None
    for found in _CUE.finditer(sentence):
        if found.start() >= start:
            break
        if not (found["false"] and found.end() <= start):
            cue = found
    if cue and not cue["false"] and (cue.end() > start or _reaches(cue, sentence, start)):
        return True
    return _denied_behind(sentence, end)


def _sentence_start(text: str, start: int) -> int:
    low = max(0, start - _REACH)
    return max((match.end() for match in _SENTENCE_END.finditer(text, low, start)), default=low)


def _reaches(cue: re.Match[str], sentence: str, start: int) -> bool:
    """Whether a cue's scope still lasts at `start`."""
    between = sentence[cue.end() : start]
    if _STOP.search(between):
        return False
    segments = _COMMA.split(between)
    if len(segments) == 1:
        return True
    # A comma ends the scope, unless what follows it goes on as a list of bare items up to the passage's own.
    rest = _COMMA.split(sentence[cue.end() :])
    place = len(segments) - 1
    items = [segment.strip() for segment in rest]
    if not all(map(_is_item, items[: place + 1])) or any(map(_CLOSING.search, items[:place])):
        return False
    if cue["listing"] and cue["listing"].isascii():
        return True
    ahead = []
    for item in items[place:]:
        if not _is_item(item):
            break
        ahead.append(item)
    return any(_CLOSING.search(item) or _LIST_END.search(item) for item in ahead)


def _is_item(segment: str) -> bool:
    """Whether a part between commas is a mere name, as the items of a list are."""
    return (
        len(segment) <= _ITEM_CHARACTERS
        and len(_CLOSING.split(segment)[0].split()) <= _ITEM_WORDS
        and not _TELLS.search(segment)
        and not _STOP.search(segment)
        and not _CUE.match(segment)
    )


def _denied_behind(sentence: str, end: int) -> bool:
    """Whether a cue behind the passage, in its clause, denies it: "Murphy sign negative", 病理征未引出."""
    tail = _COMMA.split(sentence[end:], maxsplit=1)[0]
    found = _CUE_BEHIND.search(tail)
    if not found:
        return False
    between = tail[: found.start()]
    return not (_STOP.search(between) or _CUE.search(between))


def _denies_itself(passage: str) -> bool:
    """Whether the first clause of a passage is a denial."""
    head = re.split(r"[、。；;，]|,(?!\d)", passage, maxsplit=1)[0]
    for cue in _CUE.finditer(head):
        before = head[: cue.start()]
        if not cue["false"] and not _ASSERTS.search(before) and not (cue["beside"] and before.strip()):
            return True
    return bool(_CUE_BEHIND.search(head))


def _near(needle: str, hay: str) -> tuple[int, int] | None:
    """The part of `hay` most like `needle`, if it is like enough."""
    if not _SHORTEST <= len(needle) <= min(len(hay), _LONGEST):
        return None
    found = fuzz.partial_ratio_alignment(needle, hay, score_cutoff=100 * SIMILAR)
    if found is None:
        return None
    # The window is as long as the quotation: what of it has no match is cut off at both ends.
    window = hay[found.dest_start : found.dest_end]
    equal = [block for block in Indel.opcodes(needle, window) if block.tag == "equal"]
    return found.dest_start + equal[0].dest_start, found.dest_start + equal[-1].dest_end


def _cut(text: str, at: int) -> bool:
    """Whether a boundary at `at` would part a number or a Latin word."""
    if not 0 < at < len(text):
        return False
    left, right = text[at - 1], text[at]
    if left.isdigit() and right.isdigit():
        return True
    if left.isascii() and right.isascii() and left.isalpha() and right.isalpha():
        return True
    inside_right = right in _INSIDE_NUMBER and left.isdigit() and text[at + 1 : at + 2].isdigit()
    return inside_right or (left in _INSIDE_NUMBER and right.isdigit() and text[max(0, at - 2)].isdigit())


def _whole(text: str, start: int, end: int) -> bool:
    return not (_cut(text, start) or _cut(text, end))


def _grown(text: str, start: int, end: int) -> tuple[int, int]:
    """The passage, widened to whole numbers and words."""
    while _cut(text, start):
        start -= 1
    while _cut(text, end):
        end += 1
    return start, end


def _facts(text: str) -> Counter[str]:
    return Counter("".join(fact.split()) for fact in _FACT.findall(normalise(text)))
