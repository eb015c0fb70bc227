"""One disease has one concept under all its names, and different diseases keep different ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.clinical.names import Entry, Namer, normalise, split
from preceptor.clinical.textbook.book import load


@dataclass(frozen=True)
class Aliases:
    """Other names."""

    zh: tuple[str, ...]
    en: tuple[str, ...]


@dataclass(frozen=True)
class Disease:
    """What a namer sees of a disease."""

    zh: str
    en: str
    aliases: Aliases
    icd10: str


@dataclass(frozen=True)
class Book:
    """A small textbook."""

    diseases: Mapping[str, Disease]


NAMER_BOOK = Book(
    {
        "appendicitis": Disease("急性阑尾炎", "Acute appendicitis", Aliases(("阑尾炎",), ("appendicitis",)), "K35.8"),
        "copd": Disease(
            "慢性阻塞性肺疾病",
            "Chronic obstructive pulmonary disease",
            Aliases(("慢阻肺",), ("COPD",)),
            "J44",
        ),
        "diabetes": Disease("2型糖尿病", "Type 2 diabetes mellitus", Aliases(("糖尿病",), ("T2DM",)), "E11"),
        "hypertension": Disease(
            "高血压病", "Hypertension", Aliases(("原发性高血压",), ("high blood pressure",)), "I10"
        ),
        "anaemia": Disease("缺铁性贫血", "Iron deficiency anaemia", Aliases((), ()), "D50"),
        "asthma": Disease("支气管哮喘", "Asthma", Aliases(("哮喘",), ("bronchial asthma",)), "J45.9"),
        "status": Disease("哮喘持续状态", "Status asthmaticus", Aliases((), ()), "J45.0"),
        "reflux": Disease("胃食管反流病", "Gastro-oesophageal reflux disease", Aliases((), ("GERD",)), "K21"),
    }
)
NAMER = Namer(NAMER_BOOK)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("1. 高尿酸血症；2. 皮炎", ["高尿酸血症", "皮炎"]),
        ("高血压、糖尿病", ["高血压", "糖尿病"]),
        ("高血压，糖尿病", ["高血压", "糖尿病"]),
        ("Asthma, pneumonia", ["Asthma", "pneumonia"]),
        ("Diabetes mellitus, type 2", ["Diabetes mellitus, type 2"]),
        ("Pneumonia, unspecified organism, asthma", ["Pneumonia, unspecified organism", "asthma"]),
        ("Pancreatitis, acute", ["Pancreatitis, acute"]),
        ("Asthma, acute bronchitis", ["Asthma", "acute bronchitis"]),
        ("高血压，2型糖尿病", ["高血压", "2型糖尿病"]),
        ("高血压3级，极高危", ["高血压3级，极高危"]),
        ("Diabetes mellitus, type 2; asthma", ["Diabetes mellitus, type 2", "asthma"]),
        ("1. 高血压3级，极高危；2. 皮炎", ["高血压3级，极高危", "皮炎"]),
        ("1.2型糖尿病2.高血压", ["2型糖尿病", "高血压"]),
        ("2型糖尿病（血糖不佳；肾病）；肺炎", ["2型糖尿病（血糖不佳；肾病）", "肺炎"]),
        ("⑴高血压⑵糖尿病", ["高血压", "糖尿病"]),
        ("a. 高血压\nb. 糖尿病", ["高血压", "糖尿病"]),
        ("Ⅰ. 高血压\nⅡ. 糖尿病", ["高血压", "糖尿病"]),
        ("第一，高血压；第二，糖尿病", ["高血压", "糖尿病"]),
        ("#1 Asthma\n#2 Gout", ["Asthma", "Gout"]),
        ("1: Asthma\n2: Gout", ["Asthma", "Gout"]),
        ("1 型糖尿病\n2 型糖尿病", ["1 型糖尿病", "2 型糖尿病"]),
        ("Grade 1 hypertension; type 2 diabetes", ["Grade 1 hypertension", "type 2 diabetes"]),
        ("E. coli sepsis; A. fumigatus", ["E. coli sepsis", "A. fumigatus"]),
        ("", []),
    ],
)
def test_split(names: str, expected: list[str]) -> None:
    """By the strongest separator that the string has."""
    assert split(names) == expected


def test_split_of_an_item_keeps_its_commas() -> None:
    """They belong to the name."""
    assert split("Diabetes mellitus, type 2", commas=False) == ["Diabetes mellitus, type 2"]


@pytest.mark.parametrize(
    ("name", "key", "qualifiers"),
    [
        ("疑似肺炎", "肺炎", {"suspected"}),
        ("肺炎？", "肺炎", {"suspected"}),
        ("肺炎待查", "肺炎", {"suspected"}),
        ("肺炎可能性大", "肺炎", {"suspected"}),
        ("考虑肺栓塞", "肺栓塞", {"suspected"}),
        ("Suspected pneumonia", "pneumonia", {"suspected"}),
        ("possible pneumonia?", "pneumonia", {"suspected"}),
        ("左侧股骨骨折术后", "股骨骨折", {"left", "postoperative"}),
        ("右肺炎", "肺炎", {"right"}),
        ("双侧肺炎", "肺炎", {"bilateral"}),
        ("left-sided pneumonia", "pneumonia", {"left"}),
        ("左心衰竭", "左心衰竭", set()),
        ("left heart failure", "left heart failure", set()),
        ("高血压3级（极高危）", "高血压", {"stage"}),
        ("高血压3级，极高危", "高血压", {"stage", "severity"}),
        ("Ⅱ型糖尿病", "2型糖尿病", set()),
        ("二型糖尿病", "2型糖尿病", set()),
        ("Type II Diabetes", "type 2 diabetes", set()),
        ("１．肺 炎。", "肺炎", set()),
        ("急性闌尾炎", "急性阑尾炎", set()),
        ("Crohn’s disease", "crohn disease", set()),
        ("维生素B12缺乏", "维生素b12缺乏", set()),
        ("急性阑尾炎 K35.8", "急性阑尾炎", set()),
        ("重症肌无力", "重症肌无力", set()),
        ("？", "", set()),
    ],
)
def test_normalise(name: str, key: str, qualifiers: set[str]) -> None:
    """Qualifiers go into slots; what belongs to the disease stays."""
    found = normalise(name)
    assert (found.key, set(found.qualifiers)) == (key, qualifiers)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("急性阑尾炎", "appendicitis"),
        ("阑尾炎", "appendicitis"),
        ("ACUTE APPENDICITIS", "appendicitis"),
        ("疑似急性阑尾炎？", "appendicitis"),
        ("急性阑尾炎（K35.8）", "appendicitis"),
        ("慢性阑尾炎", "慢性阑尾炎"),
        ("chronic appendicitis", "chronic appendicitis"),
        ("慢性阻塞性肺疾病（COPD）", "copd"),
        ("慢性阻塞性肺疾病急性加重期", "copd"),
        ("acute exacerbation of COPD", "copd"),
        ("急性哮喘", "asthma"),
        ("Diabetes mellitus, type II", "diabetes"),
        ("高血压", "hypertension"),
        ("高血压病3级（极高危）", "hypertension"),
        ("iron-deficiency anemia", "anaemia"),
        ("Gastroesophageal reflux disease", "reflux"),
        ("排除哮喘", "排除哮喘"),
        ("无哮喘", "无哮喘"),
        ("Unheard-of disease", "unheard of disease"),
        ("。", None),
    ],
)
def test_concept(name: str, concept: str | None) -> None:
    """The textbook's id, else the normal form; never another acuity, never what is ruled out."""
    assert NAMER.concept(name) == concept


def test_code_is_the_category() -> None:
    """Known for the textbook's diseases alone."""
    assert [NAMER.code(name) for name in ("阑尾炎", "哮喘", "皮炎")] == ["K35", "J45", None]


@pytest.mark.parametrize(
    ("predicted", "gold", "pairs"),
    [
        (["阑尾炎", "皮炎"], ["皮炎", "急性阑尾炎"], [(0, 1), (1, 0)]),
        (["阑尾炎", "急性阑尾炎"], ["阑尾炎"], [(0, 0)]),
        (["右侧肺炎", "肺炎"], ["左侧肺炎", "右肺炎"], [(0, 1), (1, 0)]),
        (["左侧肺炎"], ["右侧肺炎"], []),
        (["阑尾炎术后"], ["阑尾炎"], []),
        (["慢性胃炎病"], ["慢性胃炎"], [(0, 0)]),
        (["Hemolytic anemia"], ["haemolytic anaemia"], [(0, 0)]),
        (["哮喘"], ["哮喘持续状态"], []),
        (["。"], ["。"], []),
        ([], ["肺炎"], []),
    ],
)
def test_match_is_one_to_one(predicted: list[str], gold: list[str], pairs: list[tuple[int, int]]) -> None:
    """As many pairs as can be, with sides and operations that agree."""
    assert NAMER.match(predicted, gold) == pairs


def test_match_by_category() -> None:
    """Asthma and its status share one."""
    assert NAMER.match(["哮喘"], ["哮喘持续状态"], level="category") == [(0, 0)]


def test_every_name_of_the_textbook_leads_home() -> None:
    """And no two diseases of it are taken for each other."""
    book = load()
    namer = Namer(book)
    for identity, disease in book.diseases.items():
        for name in (disease.zh, disease.en, *disease.aliases.zh, *disease.aliases.en):
            assert namer.concept(name) == identity
            assert namer.concept(f"疑似{name}？") == identity
    for one, other in combinations(book.diseases.values(), 2):
        assert namer.match([one.zh], [other.en]) == []


@given(st.text(max_size=30))
def test_any_text_is_a_name_of_itself(name: str) -> None:
    """Naming never fails, and a name equals itself unless it holds no word."""
    assert bool(NAMER.match([name], [name])) == (NAMER.concept(name) is not None)


TABLE = (
    Entry("肺癌", "C34.9", ("支气管肺癌", "lung cancer")),
    Entry("支气管哮喘", "J46", ("BA",)),
    Entry("反流性疾病", "K99", ("GERD",)),
    Entry("新名阑尾炎", "", ("盲肠周围炎", "appendicitis")),
    Entry("另一种癌", "C80", ("支气管肺癌",)),
)


@pytest.mark.parametrize(
    ("name", "concept", "code"),
    [
        ("疑似肺癌？", "肺癌", "C34"),
        ("Lung  Cancer", "肺癌", "C34"),
        ("左侧支气管肺癌", "肺癌", "C34"),
        ("BA", "asthma", "J46"),
        ("哮喘", "asthma", "J46"),
        ("gerd", "反流性疾病", "K99"),
        ("胃食管反流病", "reflux", "K21"),
        ("盲肠周围炎", "appendicitis", "K35"),
        ("新名阑尾炎", "appendicitis", "K35"),
        ("另一种癌", "另一种癌", "C80"),
        ("皮炎", "皮炎", None),
    ],
)
def test_a_table_adds_to_the_textbook_and_wins(name: str, concept: str, code: str | None) -> None:
    """By name, or by an alias where no other code is given; else it is a new disease."""
    namer = Namer(NAMER_BOOK, TABLE)
    assert (namer.concept(name), namer.code(name)) == (concept, code)
    assert namer.knows(name) == (code is not None)


def test_contradictions_are_told() -> None:
    """One line each; what agrees is not mentioned."""
    assert Namer(NAMER_BOOK, TABLE[:1]).conflicts == []
    assert Namer(NAMER_BOOK, TABLE).conflicts == [
        "支气管哮喘: J46 by the table, no more J45.9",
        "GERD: 反流性疾病 by the table, no more reflux",
        "支气管肺癌: in the table it names both 肺癌 and 另一种癌; the first counts",
    ]


@pytest.mark.parametrize(
    ("name", "candidate", "code"),
    [
        ("Gastro-oesophagal refluks disease", "Gastro-oesophageal reflux disease", "K21"),
        ("disease reflux gastro oesophageal acid", "Gastro-oesophageal reflux disease", "K21"),
        ("急性化脓性阑尾炎", "急性阑尾炎", "K35.8"),
        ("肺癌晚期", "肺癌", "C34.9"),
        ("骨折", None, None),
    ],
)
def test_unknown_names_have_a_proposal_that_counts_for_nothing(
    name: str, candidate: str | None, code: str | None
) -> None:
    """The likest known name, or none; it is never a match."""
    namer = Namer(NAMER_BOOK, TABLE)
    proposal = namer.proposal(name)
    assert (proposal and proposal.name, proposal and proposal.code) == (candidate, code)
    assert proposal is None or 0.55 <= proposal.similarity < 1
    assert not namer.knows(name)
    assert candidate is None or namer.match([name], [candidate], level="category") == []
