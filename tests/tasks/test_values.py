"""How sure a reply says it is: every shape that models write it in, and what is no number is none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.records import Diagnosis
from preceptor.tasks.answer import Outcome, parse
from preceptor.tasks.diagnosis import canonical

A, B = "Asthma", "Gout"
P, Q = "肺炎", "哮喘"
SHAPES: list[tuple[str, dict[str, float]]] = [
    # in the order of the diseases
    ('{"diseases": ["Asthma", "Gout"], "confidence": [0.8, 0.1], "reason": ["wheeze"]}', {A: 0.8, B: 0.1}),
    ('{"diseases": ["Asthma"], "confidence": 0.8}', {A: 0.8}),
    ('{"diseases": ["Asthma"], "confidence": "0.8"}', {A: 0.8}),
    ('{"diseases": ["Asthma", "Gout"], "Probabilities": ["80%", "5 %"]}', {A: 0.8, B: 0.05}),
    ('{"diseases": ["Asthma", "Gout"], "confidence (%)": [80, 5]}', {A: 0.8, B: 0.05}),
    ('{"diseases": ["Asthma", "Gout"], "confidence_scores": "[0.8, 0.1]"}', {A: 0.8, B: 0.1}),
    ('{"diseases": ["Asthma", "Gout"], "likelihood": "0.8, 0.1"}', {A: 0.8, B: 0.1}),
    ('{"confidence": [1, 0], "diseases": ["Asthma", "Gout"]}', {A: 1.0, B: 0.0}),
    ('{"诊断": ["肺炎", "哮喘"], "置信度": [0.8, 0.15], "依据": ["发热"]}', {P: 0.8, Q: 0.15}),
    ('{"诊断": "1. 肺炎；2. 哮喘", "概率": "80%；15%"}', {P: 0.8, Q: 0.15}),
    ('{"诊断": "1. 肺炎；2. 哮喘", "可能性": "1. 80％；2. 15％"}', {P: 0.8, Q: 0.15}),
    ('{"疾病": ["肺炎"], "诊断置信度": "约80%"}', {P: 0.8}),
    # beside each name
    ('{"diseases": [{"name": "Asthma", "confidence": 0.8}, {"name": "Gout", "probability": 0.1}]}', {A: 0.8, B: 0.1}),
    ('[{"disease": "Asthma", "probability": "80%"}, {"disease": "Gout", "probability": "5%"}]', {A: 0.8, B: 0.05}),
    ('[{"疾病": "肺炎", "概率": 80, "依据": "发热"}, {"疾病": "哮喘", "概率": 15}]', {P: 0.8, Q: 0.15}),
    ('{"disease": "Asthma", "confidence": 0.8}\n{"disease": "Gout", "confidence": 0.1}', {A: 0.8, B: 0.1}),
    ('{"诊断": {"主要": {"名称": "肺炎", "可信度": 0.8}, "次要": {"名称": "哮喘", "可信度": 0.1}}}', {P: 0.8, Q: 0.1}),
    ('{"diseases": {"Asthma": 0.8, "Gout": 0.1}}', {A: 0.8, B: 0.1}),
    ('{"diseases": {"肺炎": "80%", "哮喘": {"概率": "15%", "依据": ["气喘"]}}}', {P: 0.8, Q: 0.15}),
    (
        '{"diseases": ["肺炎（概率：80%）", "哮喘 (置信度为0.15)"]}',
        {"肺炎（概率：80%）": 0.8, "哮喘 (置信度为0.15)": 0.15},
    ),
    ('{"diseases": ["Asthma (80% probability)"]}', {"Asthma (80% probability)": 0.8}),
    # by name
    ('{"diseases": ["Asthma", "Gout"], "confidence": {"gout": 0.1, "Asthma": 0.8}}', {A: 0.8, B: 0.1}),
    ('{"诊断": ["肺炎", "哮喘"], "置信度": {"哮喘": "15%"}}', {Q: 0.15}),
    # wrapped, fenced, mended, after thinking, outside of JSON
    ('```json\n{"diseases": ["Asthma"], "confidence": [0.8]}\n```', {A: 0.8}),
    (
        '<think>{"diseases": ["Gout"], "confidence": [0.9]}</think>{"diseases": ["Asthma"], "confidence": [0.8]}',
        {A: 0.8},
    ),
    ('{"answer": {"diseases": ["Asthma"]}, "confidence": 0.8}', {A: 0.8}),
    ('{"diseases": ["Asthma"]}\n{"confidence": [0.8]}', {A: 0.8}),
    ("{'diseases': ['Asthma'], 'confidence': [0.8,]}", {A: 0.8}),
    ("{“诊断”：[“肺炎”]，“置信度”：[0.8]}", {P: 0.8}),
    ("诊断：肺炎；哮喘\n置信度：80%，15%\n依据：发热", {P: 0.8, Q: 0.15}),
    ("Diagnosis: Asthma\nConfidence: 0.8", {A: 0.8}),
    ("| 诊断 | 概率 |\n|---|---|\n| 肺炎 | 80% |\n| 哮喘 | 15% |", {P: 0.8, Q: 0.15}),
    # of one named twice the first counts, and a corrected answer brings its own numbers
    ('{"diseases": ["Asthma", "Asthma"], "confidence": [0.8, 0.1]}', {A: 0.8}),
    ('{"diseases": ["Gout"], "confidence": [0.9]} No: {"diseases": ["Asthma"]}', {}),
    # percentages and points
    ('{"diseases": ["Asthma", "Gout"], "confidence": [99, 1]}', {A: 0.99, B: 0.01}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [80, 0.5]}', {A: 0.8}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": ["80%", 0.5]}', {A: 0.8, B: 0.5}),
    ('{"diseases": ["Asthma"], "confidence": [8]}', {}),
    ('{"diseases": ["Asthma"], "confidence": ["8/10"]}', {}),
    # out of range, in words, missing, of another number: none is guessed
    ('{"diseases": ["Asthma", "Gout"], "confidence": [1.2, 0.3]}', {B: 0.3}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [-0.1, 0.3]}', {B: 0.3}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [120, 30]}', {B: 0.3}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": ["120%", "30%"]}', {B: 0.3}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [NaN, Infinity]}', {}),
    (f'{{"diseases": ["Asthma"], "confidence": [1{"0" * 400}]}}', {}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [true, null]}', {}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": ["high", "低"]}', {}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": [0.8]}', {}),
    ('{"diseases": ["Asthma"], "confidence": [0.8, 0.1]}', {}),
    ('{"diseases": ["Asthma", "Gout"], "confidence": 0.8}', {}),
    ('{"diseases": ["Asthma", "unknown"], "confidence": [0.8, 0.1]}', {}),
    ('{"diseases": [], "confidence": []}', {}),
    ('{"diseases": [], "confidence": [0.9]}', {}),
    ('{"diseases": ["Asthma"], "reason": ["SpO2 88%"]}', {}),
    ('{"diseases": ["烧伤（30%）", "Carotid stenosis (70%)"]}', {}),
]


@pytest.mark.parametrize(("text", "stated"), SHAPES)
def test_what_a_reply_states(text, stated):
    parsed = parse(text)
    assert parsed.stated == pytest.approx(stated)
    assert list(parsed.stated) == [name for name in dict.fromkeys(parsed.output.diseases) if name in stated]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"diseases": {"肺炎": "80%", "哮喘": {"概率": "15%", "依据": ["气喘"]}}}', ("气喘",)),
        ('{"diseases": ["肺炎"], "依据": [{"text": "发热", "置信度": "高"}]}', ("发热",)),
        ('{"诊断": "肺炎", "置信度": "80%", "依据": "发热"}', ("发热",)),
        ("诊断：肺炎\n置信度：80%\n依据：发热", ("发热",)),
    ],
)
def test_numbers_are_no_reasons(text, reason):
    assert parse(text).output.reason == reason


def test_what_cannot_be_read_states_nothing():
    assert parse("I can't say, but my confidence is 80%.").stated == {}
    assert parse('{"diseases": ["Asthma"], "confidence": [0.8', "length").stated == {}


@given(st.dictionaries(st.sampled_from([A, B, P, Q, "2型糖尿病"]), st.floats(0, 1), max_size=4))
def test_what_is_written_is_read(numbers):
    text = canonical(Diagnosis(diseases=tuple(numbers), reason=("wheeze",)), numbers)
    parsed = parse(text)
    assert (parsed.outcome, parsed.output.diseases) == (Outcome.CLEAN, tuple(numbers))
    assert parsed.stated == {name: round(number, 2) for name, number in numbers.items()}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["80%", "0.3", "高", A, P]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([A, "name", "概率"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_JSON, _JSON)
def test_whatever_is_stated_lies_between_0_and_1(diseases, confidence):
    parsed = parse(json.dumps({"diseases": diseases, "confidence": confidence}, ensure_ascii=False))
    assert all(0 <= number <= 1 for number in parsed.stated.values())
    assert parsed.output is not None or not parsed.stated
    assert set(parsed.stated) <= set(parsed.output.diseases if parsed.output else ())
