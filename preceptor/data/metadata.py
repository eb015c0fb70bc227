"""What kind of case it is, by rules: risk, specialty, complexity, language style, whether it names a person.

The words are in `metadata.yaml`. Rules are no clinician: they make strata for splits and tables, and a
teacher may refine them. What a file says of a case stands as it is.
"""

import re
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from preceptor.clinical.evidence import denied
from preceptor.core.records import Case
from preceptor.data.sections import sections

FIELDS = ("risk_level", "specialty", "complexity", "lang_style", "is_deidentified")
_UNSAID = (None, "", "unknown", "未知")
_ASIDE = frozenset(
    ("past_history", "personal_history", "family_history", "allergies", "epidemiology", "marital_history", "sex", "age")
)
_CHILD = 14
"""Years below which a patient is a child, as Chinese hospitals count."""
_CLEAR = 3
"""Hits that a specialty needs to outweigh that the patient is a child."""
_SHORT, _LONG, _FIGURES = 40, 600, 12
"""Characters and numbers: simple below the first, complex above the others."""
_LOW_PRESSURE, _HIGH_PRESSURE, _LOW_OXYGEN = 90, 180, 90
_MENTIONS = 20
"""Places of a word that are looked at."""
_AGE = re.compile(
    r"""(?:年龄|\bage)\s*[:：]\s*(\d{1,3})(?![\d个月天]|\s*(?:months?|days?))
    | (?<!\d)(\d{1,3})\s*(?:周?岁|-?\s?years?[- ]old|\s?y/?o\b)""",
    re.IGNORECASE | re.VERBOSE,
)
_BABY = re.compile(
    r"""年龄\s*[:：]\s*\d{1,2}\s*(?:个?月|天|周)
    | (?<!\d)\d{1,2}\s*个?(?:月龄?|天)大?的?(?:患儿|[男女]婴|婴儿|宝宝|孩子|[男女]孩)
    | \b\d+[- ](?:month|week|day)s?[- ]old""",
    re.IGNORECASE | re.VERBOSE,
)
_PRESSURE = re.compile(
    r"(?:血压|\bBP|blood pressure)[^\d\n]{0,12}(\d{2,3})\s*[/／]\s*\d{2,3}(?!\s*kpa|[./\d])", re.IGNORECASE
)
_OXYGEN = re.compile(r"(?:SpO2|SaO2|血氧饱和度?|oxygen saturation|\bsats?)[^\d\n]{0,8}(\d{2})\s*[%％]", re.IGNORECASE)
_FEVER = re.compile(r"(?<![\d.])4[0-2](?:\.\d)?\s*(?:℃|°\s*C|度)", re.IGNORECASE)
_SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜"
    "戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文"
)
_PERSON = re.compile(
    rf"""(?:姓\s*名|联系人|家属姓名|患者姓名)\s*[:：]\s*(?![某×xX*＊\s])\S
    | \b(?:patient\s+)?name\s*[:：]\s*(?!x{{2}}|\*|_|\[)[a-z]
    | [{_SURNAMES}](?![某×*])(?!主任|副|主治|住院|各位|医|科|护|老师|[上下中的和与由向])[一-鿿]{{1,2}}
      (?=(?:副?主任|主治|住院)?(?:医师|医生)|教授)
    | (?:患者|病人|患儿)[{_SURNAMES}](?![某×*])[一-鿿]{{1,2}}(?=[\s，,、（(]*[男女])
    | (?:我叫|(?:主任|主治|住院)(?:医师|医生)[:：]?)[{_SURNAMES}](?![某×*])[一-鿿]{{1,2}}(?=[\s，,。、）)]|$)
    | (?-i:\b(?!The|This|Our|A\b)[A-Z][a-z]+\s[A-Z][a-z]+)\s(?:is|was)\s(?:an?\s)?\d{{1,3}}[- ]?(?:years?|y/?o)\b
    | \b(?:Mr|Mrs|Ms|Miss|Dr)\.?\s+(?-i:[A-Z][a-z]+)\b
    | (?<!\d)1[3-9]\d[ -]?\d{{4}}[ -]?\d{{4}}(?!\d) | (?<!\d)0\d{{2,3}}[-－]\d{{7,8}}(?!\d)
    | (?<!\d)\(?\d{{3}}\)?[-.\s]\d{{3}}[-.]\d{{4}}(?!\d)
    | (?<![\dA-Za-z])[1-9]\d{{5}}(?:19|20)\d{{2}}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{{3}}[\dXx](?![\dA-Za-z])
    | (?<!\d)\d{{3}}-\d{{2}}-\d{{4}}(?!\d) | [A-Za-z0-9._+-]{{1,64}}@[A-Za-z0-9-]{{1,64}}\.[A-Za-z.]{{2,}}
    | (?:身份证|住院|病案|门诊|病历|医保卡?|就诊卡)号?\s*[:：]\s*[A-Za-z]?\d{{4,}}
    | \b(?:MRN|SSN|medical\s+record\s+(?:no|number))\W{{1,3}}\d{{4,}}
    | (?:出生(?:日期|年月)?|生日|\bDOB|\bdate\s+of\s+birth|\bborn\s+on)\s*[:：]?\s*(?=[^\n]{{0,12}}\d{{4}})(?:\d|[A-Z])
    | (?:微信|QQ)号?\s*[:：]?\s*[A-Za-z0-9_-]{{5,}} | (?:家庭住址|住址|地址)\s*[:：]\s*[一-鿿]{{2,}}
    | [一-鿿]{{1,8}}(?:[路街巷]|大街|大道|小区|村)\d{{1,4}}(?:号|栋|弄|组)""",
    re.IGNORECASE | re.VERBOSE,
)


def metadata(case: Case) -> dict[str, Any]:
    """The case's metadata with the five fields, and in `sources` where each came from: file, textbook or rules.

    A field that the file leaves empty or calls unknown is filled by rules.
    """
    known = case.meta.get("sources")
    given = "textbook" if case.gold_source == "textbook" else "file"
    meta, sources = dict(case.meta), dict(known) if isinstance(known, dict) else {}
    ruled = _ruled(case) if any(meta.get(field) in _UNSAID for field in FIELDS) else {}
    for field in FIELDS:
        if meta.get(field) in _UNSAID:
            meta[field], sources[field] = ruled[field], "rules"
        else:
            sources.setdefault(field, given)
    return {**meta, "sources": sources}


def specialties() -> tuple[str, ...]:
    """All that a case's specialty may be."""
    return (*_table()["specialty"], "pediatrics", "general")


def _ruled(case: Case) -> dict[str, Any]:
    told = _told(case.text)
    risk = _risk(told, case.language)
    numbers = len(re.findall(r"\d+(?:\.\d+)?", told))
    hard = len(told) > _LONG or numbers > _FIGURES or risk == "critical"
    simple = len(told) < _SHORT and risk in ("low", "medium")
    return {
        "risk_level": risk,
        "specialty": _specialty(case.text, told, case.language),
        "complexity": 3 if hard else 1 if simple else 2,
        "lang_style": _style(case.text, case.language),
        "is_deidentified": not _PERSON.search(case.text),
    }


def _told(text: str) -> str:
    """What the record says of the present complaint."""
    parts = sections(text)
    rest = text[: parts[0].start] if parts else text
    return "\n".join(part for part in (rest, *(part.body for part in parts if part.kind not in _ASIDE)) if part.strip())


def _risk(told: str, language: str) -> str:
    pressures = [int(found) for found in _PRESSURE.findall(told)]
    if any(int(found) < _LOW_OXYGEN for found in _OXYGEN.findall(told)) or any(p < _LOW_PRESSURE for p in pressures):
        return "critical"
    levels = [level for level in ("critical", "high", "medium") if _hits("risk", level, told, language)]
    if _FEVER.search(told) or any(p >= _HIGH_PRESSURE for p in pressures):
        levels.append("high")
    return min(levels, key=("critical", "high", "medium").index, default="low")


def _specialty(text: str, told: str, language: str) -> str:
    counts = {name: len(_hits("specialty", name, told, language)) for name in _table()["specialty"]}
    best = max(counts, key=lambda name: counts[name])
    ages = [int(one or other) for one, other in _AGE.findall(text)]
    child = ages[0] < _CHILD if ages else bool(_BABY.search(text) or _hits("child", "", told, language))
    if child and counts[best] < _CLEAR and best != "obstetrics":
        return "pediatrics"
    return best if counts[best] else "general"


def _style(text: str, language: str) -> str:
    plain, expert = (len(_hits("style", style, text, language)) for style in ("colloquial", "professional"))
    if plain > expert:
        return "colloquial"
    return "professional" if expert > _CLEAR else "standard"


def _hits(table: str, row: str, text: str, language: str) -> set[str]:
    """The different words of a row that the text affirms. Style is a matter of words alone, denied or not."""
    places: dict[str, list[tuple[int, int]]] = {}
    for match in _pattern(table, row, language).finditer(text):
        places.setdefault(match[0].casefold(), []).append(match.span())
    return {
        word
        for word, spans in places.items()
        if table == "style" or not all(denied(text, *span) for span in spans[:_MENTIONS])
    }


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files("preceptor.data").joinpath("metadata.yaml").read_text("utf-8"))
    return table


@cache
def _pattern(table: str, row: str, language: str) -> re.Pattern[str]:
    """Chinese words stand anywhere, since both languages mix in Chinese records; English ones are whole words."""
    words = _table()[table][row] if row else _table()[table]
    chinese = map(re.escape, sorted(map(str, words["zh"]), key=len, reverse=True))
    english = (re.escape(word).replace(r"\*", r"\w*") for word in sorted(words["en"], key=len, reverse=True))
    return re.compile("|".join(chinese) if language == "zh" else rf"\b(?:{'|'.join(english)})(?!\w)", re.IGNORECASE)
