"""Where a record states its own answer.

It does so by a label with words behind it (诊断：, 初步诊断：, Impression:), by a sentence that admits for a
diagnosis or concludes with one, or by the gold's own names. None of these counts where it speaks of the past
or of somebody else, is denied, is only looked for, or is the conclusion of one examination's report.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from preceptor.clinical import names
from preceptor.clinical.evidence import denied
from preceptor.data.sections import DIAGNOSIS, Section, sections

ELSEWHERE = "text"
"""Label of what stands in no section."""
_NOT_NOW = frozenset(
    (
        "past_history",
        "medications",
        "personal_history",
        "allergies",
        "marital_history",
        "family_history",
        "epidemiology",
    )
)
_UNTOLD = frozenset(("personal_history", "marital_history", "epidemiology"))
_STOPS = ("。", "；", ";", ".", "!", "！", "?", "？")
_LABEL = re.compile(
    r"""(?:(?:初步|入院|门诊|急诊|临床|目前|最终|最后|主要|修正|补充|中医|西医|确定)?诊[ ]?断
        (?:意见|结果|结论|印象|内容|名称|考虑|编码)?
    |疾病名称|病名|(?:初步|临床)?印象|拟诊|初诊|\b(?:diagnos[ei]s|dx|impression|imp|assessment(?:\s?(?:and|&|/)\s?plan)?|a/p)
    |\bicd[- ]?(?:9|10|11)(?:[- ]?cm)?(?:\s?(?:编码|codes?))?)\s*(?:为|是)?\s*[:：]\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_OTHER_LABEL = re.compile(
    r"""(?:鉴别|影像学?|超声|彩超|B超|镜|病理|心电图|X线|CT|MRI?|(?:影像学|超声|X线|CT|MRI?|镜|病理)检查|产前|术前|既往|曾经?
    |外院|出院|院外|当地|原|当时|护理|[未不待性]|能否|是否
    |\b(?:of|at|since|after|before|previous|prior|past|old|known|family|nursing|prenatal|preoperative|differential
    |ct|mri|ultrasound|x[- ]?ray|radiolog\w+|patholog\w+|histolog\w+|ecg|ekg|echo|discharge|first|general))\s*$""",
    re.IGNORECASE | re.VERBOSE,
)
"""Before a label it makes another one: 鉴别诊断, age at diagnosis."""
_REPORT = re.compile(
    r"\b(?:CT|MRI?|X-?rays?|CXR|ultrasound|echo\w*|radiographs?|ECG|EKG|films?|scan|biopsy|endoscopy|colonoscopy)\b"
    r"[^\n]{0,160}$",
    re.IGNORECASE,
)
"""Behind it, `Impression:` concludes one examination."""
_SENTENCE = re.compile(
    r"""(?:以|拟)\s?[“"'‘](?=[^”"'’\n]{2,60}[”"'’]\s?(?:之|的|为)?(?:诊断)?(?:收|入院|住院))
    | (?:以|拟)(?=[^，。；\n“"]{2,30}之?诊断收)
    | (?:综上|综合|结合|根据)[^。；;\n]{0,40}?(?:诊断为|考虑诊断为?|考虑为|拟诊为?)
    | (?:目前|初步|临床)(?:诊断|考虑诊断)(?:为|是) | (?:考虑诊断|诊断考虑)为? | 拟诊为?
    | (?:以|拟)(?=[^，。；\n“"]{2,30}收(?:入|住|治))
    | (?P<plain>(?:患者|病人|我院|我科|本院|门诊)[^。；;，,\n]{0,12}?(?<![既未待])诊断为?(?![\s:：书证])
        | (?<=[，,。；;\n])\s?(?:遂|明确|确)?诊断为?(?=[\u4e00-\u9fffA-Z\d“"])
        | \b(?:is|was|been)\s+(?:newly\s+|then\s+)?diagnosed\s+(?:with|as)\b)
    | \badmitted\s+(?:with|under|for)\s+(?:a|the)\s+(?:\w+\s)?diagnosis\s+of\b
    | \b(?:the|an?|our)\s+(?:(?:final|working|most\s+likely|clinical|presumptive|provisional)\s+)*
      diagnosis\s+(?:is|was)\b
    | \b(?:final|working|most\s+likely|clinical|presumptive|provisional)\s+diagnosis\s+of\b
    | \b(?:consistent|compatible)\s+with\s+(?:a|the)\s+(?:clinical\s+)?diagnosis\s+of\b""",
    re.IGNORECASE | re.VERBOSE,
)
_NO_ANSWER = re.compile(
    r"""[\W\d_]*(?:$ | (?:略|正常|不明|[是否]|normal|stable)\W*$ | 暂?无(?:特殊|异常|明[显确]|\W|$)
    | (?:没有|未见|不详|未知|不明确|尚?未明|未定|待[定查诊回]|[同如见]上?[上前下]|见病历|什么|哪|何[种病]|\d{4}[-年/.]
    |n/?a\b|none\b|nil\b|un(?:known|clear|certain|determined|remarkable)\b|pending\b|deferred\b|see\b|as\ above\b
    |to\ be\b|tbd\b|not\b|no\b|negative\b|made\b|discussed\b|explained\b|reviewed\b|in\ doubt\b|what\b|which\b
    |confirmed\b|established\b|delayed\b|missed\b|still\b))""",
    re.IGNORECASE | re.VERBOSE,
)
"""What behind a label names no disease."""
_LONG_PAST = re.compile(
    r"""既往|曾|(?<!现)病史|外院|院外|当地医院|出院 | [去前]年 | 自幼 | \d{4}年
    | [\d一二三四五六七八九十两半数几]\s*(?:余|多|\+)?\s*年(?:余|多|\+)?\s*前
    | \b(?:history(?!\ of\ (?:the\ )?present)|h/o|known|previous(?:ly)?|prior|past|years?\s+ago|formerly
    |in\s+(?:19|20)\d\d|last\s+year|childhood)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Anywhere before it in the sentence."""
_PAST = re.compile(
    r"(?:天|日|周|个?月|年)(?:余|多|\+)?\s*前|昨[天日]|\b(?:ago|since|discharged?|last\s+(?:week|month))\b",
    re.IGNORECASE,
)
"""Before it in the same clause."""
_LASTING = re.compile(
    r"""["”』」）)]?\s*,?\s*(?:病?史|术后|放?化疗后|治疗后|复查|随访
    |(?:已|近|约)?(?:\d+|[一二三四五六七八九十两半数多几]+)\s*(?:\+|余|多|来)?\s*(?:天|日|周|个?月|年)
    |(?:for|since|diagnosed\s+in|status\s+post|in\s+(?:19|20)\d\d)\b|\(?\d+\s*(?:years?|months?|weeks?)\b)""",
    re.IGNORECASE | re.VERBOSE,
)
"""Behind it: for how long it has been known."""
_OTHERS = re.compile(
    r"""父|母(?!细胞)|兄|弟|姐|妹|家属|家人|家族|儿子|女儿|配偶|丈夫|妻子|同事|同学|室友|接触|疫苗|预防|筛查|排查|排除|除外|鉴别
    |担心|害怕|怕得|自疑|咨询|是否|有无
    |\b(?:father|mother|brother|sister|parents?|family|aunt|uncle|grand\w+|wife|husband|contact|vaccin\w+|screen\w*
    |rule\s+out|r/o|worr\w+|risk|concern\w*|differential|versus|vs|exclude[ds]?|fears?)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Before it in the same clause: it is somebody else's, or only looked for."""
_NOT_STATED = re.compile(
    r"""\s*(?:疫苗|病例|(?:确诊|疑似)[病患]|患者接触|接触|家族|高危|风险|筛查|待排|待除外|已?被?(?:排除|除外)|可能性?小|依据不足
    |vaccin|screen|risk|exposure|contact|(?:(?:is|was|has\ been)\ )?(?:unlikely|excluded|ruled\ out))""",
    re.IGNORECASE | re.VERBOSE,
)
_SYMPTOM = re.compile(
    r"""(?:急性|慢性)?(?:[发高低]热|发烧|咳[嗽痰血]|[头胸腹腰背牙咽耳关节肌肉]+痛|头[晕昏]|眩晕|腹[泻胀]|便[秘血]|呕吐|恶心|胸闷|心悸
    |气促|呼吸困难|乏力|失眠|水肿|瘙痒|皮疹|耳鸣|鼻塞|鼻出血|咯血|血尿|晕厥|抽搐|疼痛|消瘦)(?:原因)?(?:待查|查因)?
    |fever|cough|(?:head|back|tooth|ear)ache|dizziness|vertigo|(?:(?:abdominal|chest|back|joint)\ )?pain|diarrho?ea
    |constipation|vomiting|nausea|palpitations?|fatigue|insomnia|rash|tinnitus|syncope|ha?ematuria|itching|dyspno?ea
    |o?edema""",
    re.VERBOSE,
)
"""Names that are also a complaint: no record of such a patient could be told without them."""
_LINES = re.compile(r"[^\n]*(?:\n[ \t]*(?:[2-9]|1\d)\s*[.、．)）][^\n]*)*")
_NOW = re.compile(r"(?:^|[，,])\s*(?:现(?!病史)|今|目前|本次|此次)")
_ELSEWHERE = re.compile("外院|院外|当地(?:医院)?")
_DAYS = re.compile(
    r"[”」』]?\s*[\d一二三四五六七八九十两半]+\s*余?(?:天|日|周)|[”」』]?\s*(?:for\s+)?\d+\s+(?:days?|weeks?)\b"
)
"""Behind a name: it is a matter of days."""
_CLAUSE_END = re.compile(r"[。；;，,！!？?\n]|\.(?=\s|$)")
_SENTENCE_END = re.compile(r"[。；;！!？?\n]|\.(?=\s|$)")
_SHORTEST_HAN, _SHORTEST_LATIN = 2, 3
_REACH = 200
"""Characters of context that bear on a place."""
_MENTIONS = 100
"""Places of a name that are looked at."""
_Place = tuple[int, int, bool, bool]
"""Start, end, whether it is a label, and whether hospital software appends it to whatever section stands last."""


@dataclass(frozen=True)
class Leak:
    """A statement of the answer: where it stands, and the label of its section."""

    start: int
    end: int
    section: str
    labelled: bool
    """It is a label with the answer behind it, so that cutting it out leaves the rest as it was."""


def leaks(text: str, gold: Sequence[str] = ()) -> list[Leak]:
    """The places where a record states its answer, in its order; `gold` are the names of diseases, if known."""
    parts = sections(text)
    starts = [part.start for part in parts]
    own = [part for part in parts if part.kind == DIAGNOSIS and not _NO_ANSWER.match(part.body)]
    found = [Leak(part.start, part.end, part.label, labelled=True) for part in own]
    for read in (_labels(text), _sentences(text), _named(text, gold)):
        for start, end, labelled, appended in read:
            place = bisect_right(starts, start) - 1
            part = parts[place] if place >= 0 else None
            if part is None:
                found.append(Leak(start, end, ELSEWHERE, labelled))
            elif part.kind != DIAGNOSIS and (appended or part.kind not in _NOT_NOW or _apart(text, start, part)):
                found.append(Leak(start, min(end, part.end), part.label, labelled))
    return sorted(found, key=lambda leak: (leak.start, leak.end))


def _apart(text: str, start: int, part: Section) -> bool:
    """Whether a label begins a sentence of its own in a section about the past, or where no disease is told."""
    if not _LABEL.match(text, start):
        return False
    before, own_line = text[part.start : start].rstrip(), not text[: part.start].rpartition("\n")[2].strip()
    if before.endswith((":", "：", "】")):
        return part.kind in _UNTOLD
    spaces = len(text[part.start : start]) - len(before)
    return before.endswith(_STOPS) or spaces > own_line


def _labels(text: str) -> Iterator[_Place]:
    """Labels within a section, up to the end of the line; the first of a line speaks for all that follow."""
    done = 0
    for match in _LABEL.finditer(text):
        if match.start() < done:
            continue
        answer = _answer(text, match.end())
        before = text[max(0, match.start() - _REACH) : match.start()]
        if _NO_ANSWER.match(answer) or _OTHER_LABEL.search(before) or (match[0].isascii() and _REPORT.search(before)):
            continue
        appended = answer.startswith(("1、", "1.", "1．"))
        if appended or not _LONG_PAST.search(_NOW.split(_before(text, match.start(), _SENTENCE_END))[-1]):
            done = match.end() + len(answer)
            yield match.start(), done, True, appended


def _answer(text: str, start: int) -> str:
    """What stands behind a label: its line, and the numbered ones that follow it."""
    line = _LINES.match(text, start)
    return line[0] if line else ""


def _sentences(text: str) -> Iterator[_Place]:
    for match in _SENTENCE.finditer(text):
        clause = _CLAUSE_END.split(text[match.end() :], maxsplit=1)[0]
        name = re.split("[”\"'’]|收(?=[入住治])", clause, maxsplit=1)[0]
        if match["plain"]:
            before = _NOW.split(_before(text, match.end(), _SENTENCE_END))[-1]
            past = _LONG_PAST.search(f"{before} {name}") or _OTHERS.search(before) or _LASTING.search(name)
        else:  # it ends the story of an illness that may have begun long ago: only its own clause says when this was
            before = _before(text, match.start(), _CLAUSE_END)
            past = _LONG_PAST.search(before) or _PAST.search(before)
        unsaid = _NO_ANSWER.match(name) or _SYMPTOM.fullmatch(name.strip()) or denied(text, *match.span())
        if not (past or unsaid):
            yield match.start(), match.end() + len(name), False, False


def _named(text: str, gold: Sequence[str]) -> Iterator[_Place]:
    for name in dict.fromkeys(form for disease in gold for form in _forms(disease)):
        for match in islice(_pattern(name).finditer(text), _MENTIONS):
            clause, behind = _before(text, match.start(), _CLAUSE_END), text[match.end() : match.end() + _REACH]
            # Another hospital's word for what the patient has now gives the answer away like one's own.
            before = _ELSEWHERE.sub("", _before(text, match.start(), _SENTENCE_END))
            past = _LONG_PAST.search(before) or _PAST.search(clause)
            other = _OTHERS.search(clause) or _NOT_STATED.match(behind) or denied(text, *match.span())
            if not (past or other or (_LASTING.match(behind) and not _DAYS.match(behind))):
                yield *match.span(), False, False


def _forms(disease: str) -> Iterator[str]:
    """How a gold name may stand in a record: as given, without qualifiers, and what its brackets hold."""
    remarks = [remark for remark in re.findall(r"[(（]([^()（）]+)[)）]", disease) if remark[-1] not in "级期"]
    plain = re.sub(r"\s*[(（][^()（）]*[)）]", "", disease).strip(" \t?？.。；;")
    for form in (plain, names.normalise(disease).key, *remarks):
        least = _SHORTEST_LATIN if form.isascii() else _SHORTEST_HAN
        if len(form) >= least and not _SYMPTOM.fullmatch(form.casefold()):
            yield form.casefold()


def _pattern(name: str) -> re.Pattern[str]:
    if name.isascii():
        words = r"[\s\-]+".join(map(re.escape, name.split()))
        return re.compile(rf"(?<![A-Za-z0-9]){words}s?(?![A-Za-z0-9])", re.IGNORECASE)
    # Spaces and line breaks stand anywhere within Chinese words.
    return re.compile(r"\s*".join(re.escape(letter) for letter in name if not letter.isspace()), re.IGNORECASE)


def _before(text: str, place: int, mark: re.Pattern[str]) -> str:
    """What stands before a place in its sentence or clause, as `mark` ends them."""
    low = max(0, place - _REACH)
    return text[max((match.end() for match in mark.finditer(text, low, place)), default=low) : place]
