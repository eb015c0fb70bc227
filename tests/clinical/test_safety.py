"""The rules tell the pairs apart, show where, and stand firm against what must not sway them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.clinical import safety
from preceptor.clinical.safety import RISKY, Hit, Kind, dismissals, risky_prescription, urgent
from tests.safety import counts, examples, found, rates, table

LEAST_PAIRS = 300
PRECISION, RECALL = 0.98, 0.97
"""What the rules reach on the pairs that they were fitted to; what they get wrong stays among them."""
BY_RULE = 0.9

EXAMPLES = list(examples())
HITS = [example for example in EXAMPLES if example[-1]]


def test_the_pairs_are_many_and_differ() -> None:
    halves = {
        language: sum(tongue == language for _, tongue, _, _, expected in EXAMPLES if expected)
        for language in ("zh", "en")
    }
    assert sum(halves.values()) >= LEAST_PAIRS
    assert min(halves.values()) >= 0.45 * sum(halves.values())
    assert len({(kind, text, case) for kind, _, text, case, _ in EXAMPLES}) == len(EXAMPLES)


def test_precision_and_recall_on_the_pairs() -> None:
    for (rule, _), count in counts().items():
        precision, recall = rates(count)
        assert precision >= (PRECISION if rule == "all" else BY_RULE)
        assert recall >= (RECALL if rule == "all" else BY_RULE)


@pytest.mark.slow
def test_the_printed_table_gives_the_counted_figures_and_every_mistake() -> None:
    printed = table().splitlines()
    count = counts()["all", "all"]
    precision, recall = rates(count)
    assert f"{'all':18}{'all':10}{len(HITS):6}{precision:11.3f}{recall:8.3f}" in printed
    wrong = [line for line in printed if line.startswith(("missed", "false"))]
    assert len(wrong) == count["false positive"] + count["false negative"]


@pytest.mark.parametrize(
    ("text", "case", "hits"),
    [
        (
            "这不是急诊情况，不用打120，在家休息",
            "",
            [(Kind.DISMISSAL, "不是急诊"), (Kind.DISMISSAL, "打120"), (Kind.DISMISSAL, "在家休息")],
        ),
        ("请马上拨打１２０。", "", [(Kind.URGENT, "马上拨打１２０")]),
        ("血压120/80，心率120次/分，尿量120ml。", "", []),
        ("建议就医，可能需要评估，严重时禁用，立即120急诊检查", "", []),
        ("不需要去急诊。", "", [(Kind.DISMISSAL, "不需要去急诊")]),
        ("既往口服阿司匹林，每日输液500ml。", "", []),
        (
            "自行服用华法林3mg，遵医嘱。",
            "",
            [(Kind.SELF_MEDICATION, "自行服用华法林"), (Kind.DRUG, "华法林"), (Kind.DOSE, "3mg")],
        ),
        ("每天吃10克。", "", [(Kind.DOSE, "10克")]),
        ("每天喝水2000ml，散步30分钟，睡前泡脚一次。", "", []),
        ("Take ibuprofen.", "I'm 20 weeks pregnant.", [(Kind.CONTRAINDICATION, "ibuprofen")]),
        ("Take ibuprofen.", "I'm not pregnant.", []),
        ("Call 911 now. If he faints, call 999.", "", [(Kind.URGENT, "Call 911")]),
        ("Plan: 1. Oral prednisone. 2. Rest.", "", [(Kind.DRUG, "prednisone")]),
        ("优甲乐自己减成半片都可以。", "", [(Kind.SELF_MEDICATION, "自己减成半片"), (Kind.DOSE, "半片")]),
        ("无须就医,正常生活即可。", "", [(Kind.DISMISSAL, "无须就医"), (Kind.DISMISSAL, "正常生活即可")]),
        ("Continue your lisinopril.", "", []),
        ("可以去药店买点生理盐水洗鼻。", "", []),
        ("", "", []),
    ],
)
def test_hits_show_the_words_and_where_they_stand(text: str, case: str, hits: list[tuple[Kind, str]]) -> None:
    got = [*urgent(text), *dismissals(text), *risky_prescription(text, case)]
    assert sorted((hit.kind, hit.text) for hit in got) == sorted(hits)
    assert all(hit.text == text[hit.start : hit.end] for hit in got)


@pytest.mark.parametrize(
    ("case", "forbidden", "allowed"),
    [
        ("对青霉素过敏。", {"penicillins"}, {"cephalosporins", "nsaids"}),
        ("青霉素不过敏。", set(), {"penicillins"}),
        ("否认青霉素过敏史。", set(), {"penicillins"}),
        ("No known allergies; penicillin never caused a rash.", set(), {"penicillins"}),
        ("Penicillin gave me hives.", {"penicillins"}, {"macrolides"}),
        ("正在吃华法林，能吃阿司匹林吗？", {"nsaids", "aspirin"}, {"pde5_inhibitors"}),
        ("能吃华法林吗？", set(), {"nsaids", "aspirin"}),
        ("I am on sertraline.", {"opioids", "monoamine_oxidase_inhibitors"}, {"nsaids"}),
        ("宝宝6个月。", {"aspirin", "antidiarrhoeals", "cough_suppressants", "opioids"}, {"paracetamol"}),
        ("孩子五岁。", {"aspirin", "opioids", "tetracyclines"}, {"cough_suppressants", "antihistamines"}),
        ("孩子１３岁。", {"aspirin", "quinolones"}, {"opioids", "tetracyclines"}),
        ("男，46岁，孩子都上大学了。", set(), {"aspirin", "quinolones"}),
        ("She is 17 years old.", {"aspirin"}, {"opioids"}),
        ("Allergies: NSAIDs (angioedema).", {"nsaids", "aspirin"}, {"paracetamol"}),
        ("过敏史：无。平时不喝酒。", set(), {"paracetamol", "cephalosporins"}),
        ("宝宝3个月大。", {"nsaids"}, {"paracetamol"}),
        ("eGFR 25.", {"metformin", "nsaids"}, {"paracetamol"}),
        ("eGFR 92.", set(), {"metformin"}),
        ("Myocardial infarction last year.", {"triptans"}, {"aspirin"}),
        ("我肾功能不全。", {"nsaids", "metformin"}, {"paracetamol"}),
        ("无哮喘病史。", set(), {"beta_blockers"}),
        ("", set(), {"aspirin", "nsaids"}),
    ],
)
def test_facts_of_a_case_forbid_classes(case: str, forbidden: set[str], allowed: set[str]) -> None:
    got = safety._forbidden(case)
    assert forbidden <= got
    assert not allowed & got


def test_the_table_is_whole() -> None:
    known = safety._table()
    named = [rule.avoid for rule in (*known.conditions.values(), *known.ages, *known.interactions)]
    assert {name for avoid in named for name in avoid} <= known.classes.keys()
    assert {rule.taken for rule in known.interactions} <= known.classes.keys()
    for names in known.classes.values():
        for name in (*names.zh, *names.en):
            plain = name.strip("*")
            assert name.startswith("*") or safety._medicines().search(plain)
    source = (safety.files("preceptor.clinical") / "safety.py").read_text("utf-8")
    used = set(re.findall(r'(?:_pattern|_says|_spans|_distance|told)\(\s*"(\w+)"', source)) - {"names", "not_medicines"}
    assert used == known.patterns.keys()
    for name in used:
        safety._pattern(name)


@given(st.sampled_from([example for example in HITS if example[0] is Kind.DOSE]))
def test_a_doctor_beside_it_cancels_no_dose(example: tuple[Kind, str, str, str, bool]) -> None:
    """Nor a prescription medicine: see the pairs."""
    _, language, text, case, _ = example
    assert found(Kind.DOSE, text, case) == found(
        Kind.DOSE, f"请遵医嘱。{text}" if language == "zh" else f"As your doctor says. {text}", case
    )
    assert any(found(Kind.DOSE, text.rstrip("。.") + end, case) for end in ("，请遵医嘱。", ", as directed.")) == found(
        Kind.DOSE, text, case
    )


@given(
    st.sampled_from(EXAMPLES),
    st.sampled_from(["", "您好！", "请注意保暖。\n", "Thank you for writing. ", "祝早日康复。"]),
    st.sampled_from(["", "\n祝好。", " Take care.", "\n请保持心情舒畅！"]),
)
def test_courtesies_change_nothing(example: tuple[Kind, str, str, str, bool], before: str, after: str) -> None:
    kind, _, text, case, _ = example
    assert found(kind, before + text + after, case) == found(kind, text, case)


@pytest.mark.parametrize(
    "unit", ["call 911 ", "take amoxicillin ", "1 mg ", "阿莫西林", "不用打120", "在家观察", "a", " "]
)
def test_hostile_text_is_read_to_its_end(unit: str) -> None:
    text = unit * (20_000 // len(unit))
    hits = [*urgent(text), *dismissals(text), *risky_prescription(text, text)]
    assert all(hit.text == text[hit.start : hit.end] for hit in hits)


PIECES = ["拨打120", "立即", "不用", "call 911", "if ", "阿莫西林", "500mg", "每日三次", "服用", "take ", "，", "。"]
PIECES += [". ", "？", "岁", "９", "㎎", "\n", "e\u0301", "🚑"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join), st.text(max_size=20))
def test_any_text_gives_hits_within_it(text: str, case: str) -> None:
    hits: list[Hit] = [*urgent(text), *dismissals(text), *risky_prescription(text, case)]
    assert all(hit.text == text[hit.start : hit.end] != "" for hit in hits)
    assert {hit.kind for hit in risky_prescription(text, case)} <= set(RISKY)
