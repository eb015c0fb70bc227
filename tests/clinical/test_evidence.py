"""Quotations are found where they stand, changed facts are not, and denial is read by clause."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.clinical.evidence import locate, places, polarity
from preceptor.core.records import Polarity

ZH = "性别: 男 年龄: 56 主诉: 反复胸痛3天，加重1天。现病史: 体温38.6℃，血压150/90mmHg，右下腹压痛，WBC 12.3×10^9/L。"
EN = "Sex: male. Cough for 12 days with yellow sputum, temperature 38.6 °C. Pain in the left lower chest."


@pytest.mark.parametrize(
    ("quote", "text", "passage"),
    [
        ("反复胸痛3天", ZH, "反复胸痛3天"),
        ("“反复胸痛3天”。", ZH, "反复胸痛3天"),
        ("主诉：反复胸痛3天,加重1天", ZH, "主诉: 反复胸痛3天，加重1天"),
        ("体温 38.6 ℃", ZH, "体温38.6℃"),
        ("ＷＢＣ　１２.３", ZH, "WBC 12.3"),
        ("反复性胸痛3天，加重1天", ZH, "反复胸痛3天，加重1天"),
        ("cough FOR 12 days", EN, "Cough for 12 days"),
        ("cough for 12 days with yellowish sputum", EN, "Cough for 12 days with yellow sputum"),
        ("Pain in the left\nlower chest", EN, "Pain in the left lower chest"),
        ("56", ZH, "56"),
    ],
)
def test_locate_finds_the_passage(quote: str, text: str, passage: str) -> None:
    """Exact, but for width, case, spaces and wrapping; else nearly."""
    span = locate(quote, text)
    assert span is not None
    assert text[slice(*span)] == passage


@pytest.mark.parametrize(
    ("quote", "text"),
    [
        ("体温36.8℃", ZH),
        ("8.6℃", ZH),
        ("体温38", ZH),
        ("血压150", ZH),
        ("反复胸痛13天，加重1天", ZH),
        ("反复胸痛3周，加重1天", ZH),
        ("左下腹压痛", ZH),
        ("右下腹无压痛", ZH),
        ("糖尿病史10年", ZH),
        ("Cough for 2 days with yellow sputum", EN),
        ("Cough for 12 weeks with yellow sputum", EN),
        ("Pain in the right lower chest", EN),
        ("No pain in the left lower chest", EN),
        ("ale", EN),
        ("pain", "painless haematuria"),
        ("", ZH),
        ("。，", ZH),
        ("咳嗽", ""),
        ("\u200b", ZH),
        ("反" * 5000, ZH),
    ],
)
def test_locate_refuses_what_the_record_does_not_say(quote: str, text: str) -> None:
    """A changed number, unit, side or denial is another statement, and a part of a number or word is none."""
    assert locate(quote, text) is None


def test_places_gives_every_exact_passage() -> None:
    """So that a grader may take the one whose polarity agrees."""
    assert list(places("发热", "无发热，3天后发热")) == [(1, 3), (7, 9)]


AFFIRMED = [
    ("发热3天", "发热"),
    ("无发热，咳嗽2天", "咳嗽"),
    ("无发热,咳嗽", "咳嗽"),
    ("无发热但咳嗽", "咳嗽"),
    ("无发热伴咳嗽", "咳嗽"),
    ("无明显诱因出现胸痛", "胸痛"),
    ("无明显诱因胸痛2小时", "胸痛"),
    ("无痛性血尿1周", "血尿"),
    ("四肢无力", "四肢无力"),
    ("不能除外肺炎", "肺炎"),
    ("肺炎待排除", "肺炎"),
    ("肺炎不除外", "肺炎"),
    ("否认高血压，糖尿病史3年", "糖尿病"),
    ("未见好转。发热", "发热"),
    ("服药后无缓解，头痛加重", "头痛"),
    ("咳嗽无痰", "咳嗽"),
    ("发热，无咳嗽", "发热"),
    ("发热3天，无咳嗽", "发热3天，无咳嗽"),
    ("无发热；咳嗽", "咳嗽"),
    ("既往史: 否认高血压\n现病史: 头痛", "头痛"),
    ("胸部CT示右肺炎症，未见空洞", "炎症"),
    ("无寒战 发热3天", "发热"),
    ("no fever, cough for two days", "cough"),
    ("No fever but cough", "cough"),
    ("no fever; cough", "cough"),
    ("No fever. Cough.", "Cough"),
    ("denies fever, has cough", "cough"),
    ("denies fever, cough for two days", "cough"),
    ("denies fever or chills, cough", "cough"),
    ("cough without fever", "cough"),
    ("cough with no fever", "cough with no fever"),
    ("no improvement of the cough", "cough"),
    ("pneumonia cannot be excluded", "pneumonia"),
    ("without obvious cause chest pain", "chest pain"),
    ("cough and negative sputum smear", "cough"),
    ("cannot rule out appendicitis", "appendicitis"),
]
NEGATED = [
    ("无发热", "发热"),
    ("无发热", "无发热"),
    ("患者无发热", "患者无发热"),
    ("近3天无发热", "近3天无发热"),
    ("无发热、咳嗽", "咳嗽"),
    ("无发热、咳嗽及咳痰", "咳痰"),
    ("无恶心呕吐", "呕吐"),
    ("否认高血压、糖尿病、冠心病病史", "冠心病"),
    ("否认高血压，糖尿病，冠心病病史", "糖尿病"),
    ("否认: 高血压", "高血压"),
    ("无发热，咳嗽，咳痰等不适", "咳嗽"),
    ("咳嗽，无发热", "发热"),
    ("咳嗽不伴发热", "发热"),
    ("双肺未闻及干湿啰音", "干湿啰音"),
    ("双肺未闻及干湿啰音", "双肺未闻及干湿啰音"),
    ("未见异常", "见异常"),
    ("没有胸痛", "胸痛"),
    ("没咳嗽", "咳嗽"),
    ("除外肺炎", "肺炎"),
    ("肺炎已排除", "肺炎"),
    ("Murphy征阴性", "Murphy征"),
    ("Murphy征(-)", "Murphy征"),
    ("Murphy征（-）", "Murphy征（-）"),
    ("病理征未引出", "病理征"),
    ("肝、脾肋下未触及", "脾"),
    ("头痛、发热均无", "头痛"),
    ("无明显诱因出现胸痛，无发热", "发热"),
    ("no fever", "fever"),
    ("There is no fever.", "There is no fever"),
    ("denies fever, chills or cough", "fever"),
    ("denies fever, chills or cough", "chills"),
    ("denies fever, chills or cough", "cough"),
    ("denies fever, chills and cough", "cough"),
    ("denies fever, chills, and cough", "chills"),
    ("Denies fever, chills, cough.", "chills"),
    ("no fever, chills, or cough", "cough"),
    ("no fever or cough for two days", "cough"),
    ("negative for fever, rash", "rash"),
    ("cough without fever", "fever"),
    ("without fever", "without fever"),
    ("does not have chest pain", "chest pain"),
    ("doesn't have chest pain", "chest pain"),
    ("no evidence of pneumonia", "pneumonia"),
    ("no history of hypertension or diabetes", "diabetes"),
    ("Murphy sign negative", "Murphy sign"),
    ("negative Murphy sign", "negative Murphy sign"),
    ("无尿痛", "无尿痛"),
    ("血红蛋白无降低", "血红蛋白无降低"),
    ("Murphy sign was negative.", "Murphy sign"),
    ("chest pain is denied", "chest pain"),
    ("pneumonia was ruled out", "pneumonia"),
    ("rash not seen", "rash"),
    ("has cough, denies fever", "fever"),
]


@pytest.mark.parametrize(
    ("text", "passage", "expected"),
    [(*case, Polarity.AFFIRMED) for case in AFFIRMED] + [(*case, Polarity.NEGATED) for case in NEGATED],
)
def test_polarity(text: str, passage: str, expected: Polarity) -> None:
    """Cues, their scopes, and phrases that only look like cues."""
    start = text.index(passage)
    assert polarity(text, start, start + len(passage)) is expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="无发热、，咳嗽 denies fever,1.38℃", max_size=60), st.data())
def test_any_whole_slice_is_found_and_judged(text: str, data: st.DataObject) -> None:
    """Whatever is located lies in the text, and neither function fails on any slice."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    for a, b in places(text[start:end], text):
        assert 0 <= a < b <= len(text)
        assert polarity(text, a, b) in Polarity
