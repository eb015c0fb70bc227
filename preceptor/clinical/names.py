"""Names of diseases: taken apart, brought to one form, and matched between an answer and the gold.

A name is looked up as it was written before anything is taken off it, since 急性阑尾炎 is a disease of its
own and not an acute sort of something. What is taken off goes into slots, and two names whose slots
contradict each other (左/右, or an operation that only one of them has behind it) are not the same diagnosis.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from preceptor.core import text

Level = Literal["concept", "category"]


class Aliases(Protocol):
    """Other names of a disease."""

    @property
    def zh(self) -> Sequence[str]:
        """The Chinese ones."""

    @property
    def en(self) -> Sequence[str]:
        """The English ones."""


class Disease(Protocol):
    """What a namer needs to know of a disease."""

    @property
    def zh(self) -> str:
        """Its Chinese name."""

    @property
    def en(self) -> str:
        """Its English name."""

    @property
    def aliases(self) -> Aliases:
        """Its other names."""

    @property
    def icd10(self) -> str:
        """Its code."""


class Book(Protocol):
    """Where the diseases come from: the textbook."""

    @property
    def diseases(self) -> Mapping[str, Disease]:
        """By id."""


@dataclass(frozen=True)
class Entry:
    """A disease in a user's table of names."""

    name: str
    code: str = ""
    """ICD-10; empty where the table gives none."""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """The known name that looks most like an unknown one: for a person to confirm, never counted."""

    name: str
    code: str
    similarity: float
    """In [0, 1]: characters in common and in order, after the words were sorted."""


@dataclass(frozen=True)
class Name:
    """A name in its normal form without its qualifiers."""

    key: str
    qualifiers: frozenset[str] = frozenset()

    def contradicts(self, other: "Name") -> bool:
        """Whether two names can't be the same diagnosis, whatever disease they speak of."""
        either = self.qualifiers ^ other.qualifiers
        return "postoperative" in either or {"left", "right"} <= either


_SIMPLE = str.maketrans(
    "區獲廣機癆狹癢腸蟲飲亂屬聯殘癥瘧癬癰癲癇瘡瘺瘻痙攣膽腎臟腦腫節頸頭動靜脈壓過損傷斷關結腸膚膿體質營養縮變態應緊張鬱慮癱瘓痺風濕熱燒嘔瀉貧細單雙側穩絞顫韌"
    "帶齒齦顎顱顏鱗狀賁門闌寶產婦兒氣竇繼發綜徵癒後術遺異礙於類與無傳診療檢驗紅髖潰瘍擴進減銅鐵鈣鉀鈉納鹼總膠贅積滯澀鳴聾視網離輸葉鏈環腳",
    "区获广机痨狭痒肠虫饮乱属联残症疟癣痈癫痫疮瘘瘘痉挛胆肾脏脑肿节颈头动静脉压过损伤断关结肠肤脓体质营养缩变态应紧张郁虑瘫痪痹风湿热烧呕泻贫细单双侧稳绞颤韧"
    "带齿龈颚颅颜鳞状贲门阑宝产妇儿气窦继发综征愈后术遗异碍于类与无传诊疗检验红髋溃疡扩进减铜铁钙钾钠纳碱总胶赘积滞涩鸣聋视网离输叶链环脚",
)
"""Traditional characters that names of diseases are made of."""
_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6", "vii": "7", "viii": "8"}
_ROMAN_WORD = re.compile(r"(?<![a-z'])(?:viii|vii|vi|iv|v|iii|ii|i)(?![a-z'])")
_NUMERAL = re.compile(r"[一二三四五六七八九](?=[型级期度])")
_CODE = re.compile(r"(?<!\w)[A-Z]\d{2}\.[\dx]{1,4}(?!\w)")
"""An ICD-10 code beside a name. Without its point it might be a vitamin; in brackets it goes as a remark."""
_REMARK = re.compile(r"\s*[(（\[【]([^()（）\[\]【】]*)[)）\]】]")

_SLOTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "suspected",
        re.compile(
            r"^(?:高度)?(?:疑似|疑诊|怀疑|可疑|考虑(?:为|是)?|不(?:能|可)?(?:排除|除外)|拟诊|倾向于?|可能[为是]?)[:,]?|^(?:可能|疑)(?=..)|(?<!\?)\?+$"
            r"|(?:可能性?大?|待查因?|待[排诊]|待?不?除外|待排除?|待排查|不排除|不能除外|疑似)$"
            r"|\b(?:(?:highly )?suspected|suspicion of|possible|possibly|probable|probably|likely"
            r"|presumed|presumptive|query|rule out|r/o|to be excluded|consider(?:ing)?)\b"
        ),
    ),
    (
        "postoperative",
        re.compile(r"术后(?:状态|恢复期)?$|\b(?:post[- ]?operative|(?:status post|s/p)(?: surgery)?|after surgery)\b"),
    ),
    ("left", re.compile(r"^左侧?(?!心|室|房)|,左侧?$|\bleft(?: sided|-sided)?\b(?! (?:heart|ventric|atri))")),
    ("right", re.compile(r"^右侧?(?!心|室|房)|,右侧?$|\bright(?: sided|-sided)?\b(?! (?:heart|ventric|atri))")),
    ("bilateral", re.compile(r"^双侧?|^两侧|\bbilateral\b")),
    (
        "severity",
        re.compile(r"^(?:极?重度|中度|轻度)(?=..)|[,]?(?:极高危|高危|中危|低危)组?$|\b(?:mild|moderate|severe)\b"),
    ),
    (
        "stage",
        re.compile(
            r"[,]?(?:心功能|(?:nyha|gold)(?: ?分级)?)? ?\d级$|[,]?\d期$"
            r"|\b(?:(?:nyha|gold) )?(?:stage|grade|class) (?:\d|[a-d])\b|\b(?:nyha|gold) \d\b"
        ),
    ),
    (
        "course",
        re.compile(
            r"急性加重期?$|急性发作期?$|发作期?$|^(?:稳定|缓解|恢复|活动|急性加重|急性发作)期|(?:稳定|缓解|恢复|活动)期$"
            r"|\b(?:acute )?exacerbation of\b|(?:,| with) acute exacerbation$|^active\b"
        ),
    ),
)
_ACUITY = (("急性", "acute"), ("慢性", "chronic"))
_SAME = {"æ": "ae", "œ": "oe", "返流": "反流", "食道": "食管", "肠胃炎": "胃肠炎", "机能": "功能"}
"""Ways to write the same word."""
_SAME_WORD = re.compile("|".join(_SAME))
_ALIKE = 55
"""Per cent of similarity below which a name is no proposal."""
_LONGEST = 300
"""Characters of a name that are looked at."""
_BRITISH = ((re.compile("[ao]+e"), "e"), (re.compile("our"), "or"), (re.compile("ise"), "ize"))
_FILLERS = frozenset({"of", "the", "a", "an", "disease", "disorder", "syndrome", "s"})
_CIRCLES = str.maketrans("⑴⑵⑶⑷⑸⑹⑺⑻⑼➀➁➂➃➄➅➆➇➈❶❷❸❹❺❻❼❽❾", "①②③④⑤⑥⑦⑧⑨" * 3)
_SEQUENCES = tuple(
    (sequence, re.compile(rf"(?im)(?:^|(?<=[；;]))\s*(?P<number>{'|'.join(map(re.escape, sequence))}){after}"))
    for sequence, after in (
        (tuple("abcdefgh"), r"[.)、．）]\s*"),
        (("ⅰ", "ⅱ", "ⅲ", "ⅳ", "ⅴ", "ⅵ"), r"[.、．:：\s]\s*"),
        (("i", "ii", "iii", "iv", "v", "vi"), r"[.)、．）]\s*"),
        (tuple(f"第{numeral}" for numeral in "一二三四五六七八"), r"[，,、:：]\s*"),
        (tuple(f"#{number}" for number in range(1, 10)), r"[.:：]?\s*"),
        (tuple(map(str, range(1, 10))), r"(?:[:：]\s*|\s+)(?![型期级度])"),
        (("+",) * 9, r"\s+"),
    )
)
"""Numberings that `text.numbered` leaves alone, with what follows the number; each on a line or behind a semicolon."""
_LIST = re.compile(r"[；;、\n|]")
_COMMA = re.compile(
    r"""[，,](?!\s*(?:(?:type|stage|grade|class|unspecified|without|with|due|not|nos|other|site)\b
    |(?:acute|chronic|left|right|bilateral|mild|moderate|severe|primary|secondary)\s*(?:[，,]|$)
    |(?:极高危|[很高中低]危|[ⅠⅡⅢⅣIVX\d]+[型级期](?:[，,]|$))))""",
    re.IGNORECASE | re.VERBOSE,
)
"""Not where what follows belongs to the name before, as classifications have it: Diabetes mellitus, type 2."""


def split(names: str, *, commas: bool = True) -> list[str]:
    """The names in a string, parted by number, semicolon, 、 or line; by comma only where nothing else does.

    Separators between brackets don't count. `commas=False` is for what is already one item of a list, whose
    comma belongs to the name ("diabetes mellitus, type 2", 高血压3级，极高危).
    """
    names = _renumbered(names)
    points = text.numbered(names)
    parts = [part for point in points or [names] for part in _outside_brackets(point, _LIST)]
    if commas and points is None and len(parts) == 1:
        parts = _outside_brackets(parts[0], _COMMA)
    return [part for part in (text.bare(part).rstrip(".") for part in parts) if part]


def _renumbered(names: str) -> str:
    """The names with rarer numberings (⑴, a., Ⅱ., #1, 2:, 第一，) as 1. 2. 3., where each follows the one before."""
    names = names.translate(_CIRCLES)
    for sequence, number in _SEQUENCES if re.search(r"[；;\n]", names) else ():
        found = list(number.finditer(names))
        if len(found) > 1 and [one["number"].casefold() for one in found] == [*sequence[: len(found)]]:
            for place, one in reversed(list(enumerate(found, 1))):
                names = f"{names[: one.start()]}\n{place}. {names[one.end() :]}"
            return names.strip()
    return names


def normalise(name: str) -> Name:
    """A name's normal form, its qualifiers taken off into slots; 急性 and 慢性 stay on it."""
    whole = _plain(name)
    key, qualifiers = whole, set()
    for slot, pattern in _SLOTS:
        rest = pattern.sub(" ", key).strip(" ,-:")
        if rest != key and rest:
            key = " ".join(rest.split())
            qualifiers.add(slot)
    return Name(_key(key), frozenset(qualifiers))


class Namer:
    """Knows a textbook's diseases by all their names in both languages, and those of a user's table."""

    def __init__(self, book: Book, table: Iterable[Entry] = ()) -> None:
        """Where the table contradicts the textbook it wins, and `conflicts` says so, a line each."""
        self.conflicts: list[str] = []
        self._codes = {identity: disease.icd10 for identity, disease in book.diseases.items()}
        self._known: dict[str, str] = {}
        names = {
            identity: [disease.zh, disease.en, *disease.aliases.zh, *disease.aliases.en]
            for identity, disease in book.diseases.items()
        }
        self._written = {_key(_plain(name)): name for known in names.values() for name in known}
        for identity, known in names.items():
            for name in known:
                self._known[_key(_plain(name))] = identity
        self._loosen(names)
        added: dict[str, list[str]] = {}
        for entry in table:
            self._add(entry, added)
        self._loosen(added)
        for identity, known in added.items():
            names.setdefault(identity, []).extend(known)
        self._all = {identity: " ".join(map(_plain, known)) for identity, known in names.items()}
        self._resolve = lru_cache(maxsize=16_384)(self._resolved)

    def _loosen(self, names: Mapping[str, Sequence[str]]) -> None:
        """Looser forms of names lead home too, but never take the place of another disease's own name."""
        for identity, known in names.items():
            for name in known:
                for form in _variants(_key(_plain(name))):
                    if form not in self._written:
                        self._known.setdefault(form, identity)

    def _add(self, entry: Entry, added: dict[str, list[str]]) -> None:
        """A row of the table: a disease that is known by its name, or by an alias and no other code, or a new one."""
        keys = {key: name for name in (entry.name, *entry.aliases) if (key := _key(_plain(name)))}
        own = next(iter(keys))
        alike = (self._find(key) for key in keys)
        same = next((i for i in alike if i and (not entry.code or self._codes[i][:3] == entry.code[:3])), None)
        identity = self._find(own) or same or own
        if entry.code:
            before = self._codes.get(identity)
            if before and before[:3] != entry.code[:3]:
                self.conflicts.append(f"{entry.name}: {entry.code} by the table, no more {before}")
            self._codes[identity] = entry.code
        self._codes.setdefault(identity, "")
        for key, name in keys.items():
            other = self._known.get(key, identity)
            if other != identity and key in map(_key, map(_plain, added.get(other, ()))):
                self.conflicts.append(f"{name}: in the table it names both {other} and {identity}; the first counts")
                continue
            if other != identity and key in self._written:
                self.conflicts.append(f"{name}: {entry.name} by the table, no more {other}")
            for form in _variants(key):
                if form not in self._written:
                    self._known[form] = identity
            self._known[key] = identity
            self._written[key] = name
            added.setdefault(identity, []).append(name)

    def concept(self, name: str) -> str | None:
        """The id of a known disease, else the normalised name; None for what holds no word."""
        return self._resolve(name)[0]

    def code(self, name: str) -> str | None:
        """The ICD-10 category of a disease that is known with its code."""
        return self._codes.get(self.concept(name) or "", "")[:3] or None

    def knows(self, name: str) -> bool:
        """Whether a name leads to a disease of the textbook or the table."""
        return self.concept(name) in self._codes

    def proposal(self, name: str) -> Proposal | None:
        """What an unknown name might mean; None where no known one is like it."""
        from rapidfuzz import fuzz, process

        known = list(self._written)
        found = process.extractOne(normalise(name).key, known, scorer=fuzz.token_sort_ratio, score_cutoff=_ALIKE)
        if found is None:
            return None
        key, percent, _ = found
        return Proposal(self._written[key], self._codes[self._known[key]], percent / 100)

    def match(self, predicted: Sequence[str], gold: Sequence[str], level: Level = "concept") -> list[tuple[int, int]]:
        """The most pairs of equal names, each name in one pair at most, as indices into both lists."""
        equal = [
            (i, j) for i, one in enumerate(predicted) for j, other in enumerate(gold) if self._equal(one, other, level)
        ]
        if len({i for i, _ in equal}) == len({j for _, j in equal}) == len(equal):
            return equal  # no name is asked for twice, as nearly always
        from scipy.optimize import linear_sum_assignment

        table = np.zeros((len(predicted), len(gold)), dtype=np.bool_)
        table[tuple(zip(*equal, strict=True))] = True
        rows, columns = linear_sum_assignment(table, maximize=True)
        return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if table[i, j]]

    def _equal(self, one: str, other: str, level: Level) -> bool:
        (concept, name), (concept_other, name_other) = self._resolve(one), self._resolve(other)
        if one == other:
            return concept is not None
        if concept is None or concept_other is None or name.contradicts(name_other):
            return False
        if concept == concept_other or not _loose(concept).isdisjoint(_loose(concept_other)):
            return True
        return level == "category" and (code := self.code(one)) is not None and code == self.code(other)

    def _resolved(self, given: str) -> tuple[str | None, Name]:
        name = normalise(given)
        for form in self._forms(given, name):
            if identity := self._find(form):
                return identity, name
        for acuity, opposite in (_ACUITY, _ACUITY[::-1]):
            milder = _key(re.sub(rf"^亚?{acuity[0]}|\b(?:sub)?{acuity[1]}\b", " ", name.key))
            identity = self._find(milder) if milder != name.key else None
            if identity and not any(word in self._all[identity] for word in opposite):
                return identity, name
        return name.key or None, name

    def _find(self, key: str) -> str | None:
        found = next((self._known[form] for form in (key, *_variants(key)) if form in self._known), None)
        # 哮喘病 is 哮喘, whose name is known; 糖尿 is not 糖尿病.
        return found or (self._known.get(short) if (short := key.rstrip("病症")) in self._written else None)

    def _forms(self, given: str, name: Name) -> Iterator[str]:
        """From as it is written to what is left when all qualifiers are gone; then remarks in brackets."""
        yield _key(_plain(given, remarks=True))
        yield _key(_plain(given))
        yield name.key
        yield name.key.removeprefix("重症")  # 重症肌无力 is a name of its own, met above
        yield from (_key(_plain(remark)) for remark in _REMARK.findall(given))


@lru_cache(maxsize=16_384)
def _plain(name: str, *, remarks: bool = False) -> str:
    """One width, case, script and set of numerals; without codes and, unless wanted, remarks in brackets."""
    name = unicodedata.normalize("NFKC", text.bare(name[:_LONGEST]))
    name = _CODE.sub(" ", name).strip() or name
    if not remarks:
        name = _REMARK.sub(" ", name).strip() or name
    name = _SAME_WORD.sub(lambda m: _SAME[m.group()], text.normalise(name).translate(_SIMPLE))
    name = _NUMERAL.sub(lambda m: str("一二三四五六七八九".index(m.group()) + 1), name)
    return _ROMAN_WORD.sub(lambda m: _ROMAN[m.group()], name)


def _key(plain: str) -> str:
    """Words alone: one space between Latin ones, none around Chinese."""
    words = " ".join(re.sub(r"[^\w]+|_", " ", plain.replace("'s ", " ")).split())
    return re.sub(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])", "", words)


def _variants(key: str) -> Iterator[str]:
    """Looser forms of the same: 高血压 for 高血压病; English words in any order and either spelling."""
    if not key.isascii():
        if len(key) > 3:  # noqa: PLR2004  糖尿 is not 糖尿病
            yield key.removesuffix("病").removesuffix("症")
        return
    if words := {_respelled(word) for word in key.split() if word not in _FILLERS}:
        yield "\n".join(sorted(words))
    yield "\n" + _respelled("".join(key.split()))


@lru_cache(maxsize=16_384)
def _loose(concept: str) -> frozenset[str]:
    return frozenset((concept, *_variants(concept)))


def _respelled(word: str) -> str:
    """A word in American spelling and without the s of a plural."""
    for british, american in _BRITISH:
        word = british.sub(american, word)
    return word.removesuffix("s") if len(word) > 4 and not word.endswith(("is", "us", "ss")) else word  # noqa: PLR2004  gas, yes


def _outside_brackets(names: str, separator: re.Pattern[str]) -> list[str]:
    """Splits where no bracket is open."""
    hidden = re.sub(r"[(（][^()（）]*[)）]", lambda match: "·" * len(match.group()), names)
    cuts = [match.span() for match in separator.finditer(hidden)]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(names)]
    return [names[start:end] for start, end in zip(starts, ends, strict=True)]
