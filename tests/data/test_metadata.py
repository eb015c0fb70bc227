import json
from pathlib import Path

import pytest

from preceptor.core.records import Case
from preceptor.data.metadata import FIELDS, metadata

REAL = Path(__file__).parents[3] / "shared" / "data"


def meta(text, language=None, **fields):
    language = language or ("en" if text.isascii() else "zh")
    return metadata(Case(id="1", text=text, language=language, source="test", group="g", **fields))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("突发胸痛，意识丧失", "critical"),
        ("发热3天，否认意识丧失", "medium"),
        ("否认胸痛、咯血，来开药", "low"),
        ("主诉: 脱屑\n既往史: 心肌梗死", "low"),
        ("胸痛2天", "high"),
        ("头皮脱屑4年", "low"),
        ("BP 80/50mmHg", "critical"),
        ("血压188/110mmHg", "high"),
        ("血压120/70mmHg", "low"),
        ("血压9.3/6.7kPa", "low"),
        ("SpO2 85%", "critical"),
        ("体温40.2℃", "high"),
        ("sudden chest pain and now unresponsive", "critical"),
        ("denies chest pain, here for a refill", "low"),
        ("three months pregnant, feels well", "high"),
        ("a cold", "low"),
        ("fever for two days", "medium"),
    ],
)
def test_risk(text, expected):
    assert meta(text)["risk_level"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("性别: 男\n年龄: 40\n主诉: 咽痛、鼻塞\n既往史: 糖尿病，胰岛素治疗", "ear_nose_throat"),
        ("年龄: 5\n主诉: 咳嗽", "pediatrics"),
        ("8个月女婴，腹泻4天", "pediatrics"),
        ("年龄: 45\n主诉: 咳嗽、咳痰", "respiratory"),
        ("孕32周，阴道流血", "obstetrics"),
        ("多饮、多尿，血糖14mmol/L", "endocrinology"),
        ("要求开单", "general"),
        ("一名35岁女性情绪低落、失眠、焦虑", "psychiatry"),
        ("A 50-year-old with polyuria, polydipsia and high glucose", "endocrinology"),
        ("A 3-year-old with a cough", "pediatrics"),
        ("wants a form signed", "general"),
    ],
)
def test_specialty(text, expected):
    assert meta(text)["specialty"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我妈肚子疼怎么办", "colloquial"),
        ("体格检查: 双肺呼吸音清，未闻及湿啰音，腹软，无反跳痛，WBC 12", "professional"),
        ("咳嗽三天", "standard"),
        ("my mum keeps throwing up, what should i do", "colloquial"),
        ("BP 120/80 mmHg, WBC 12, CRP 40, bilateral crackles on auscultation", "professional"),
        ("cough for three days", "standard"),
    ],
)
def test_style(text, expected):
    assert meta(text)["lang_style"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("咳嗽", 1), ("咳嗽三天，" * 20, 2), ("咳嗽三天，" * 200, 3), ("昏迷", 3), (" ".join("1" * 20), 3)],
)
def test_complexity(text, expected):
    assert meta(text, "zh")["complexity"] == expected


@pytest.mark.parametrize(
    "text",
    [
        "姓名：王小明，男",
        "患者姓名: 李四",
        "电话13912345678",
        "电话0571-88888888",
        "身份证 330102199003071234",
        "住院号：0012345",
        "出生日期：1990年3月7日",
        "感染科赵明远主任医师查看",
        "家庭住址：杭州市西湖区",
        "微信：abc_12345",
        "Name: John Smith",
        "Mr. Smith came in",
        "call (415) 555-0132",
        "SSN 078-05-1120",
        "MRN: 1234567",
        "DOB: 3 May 1980",
        "jane@example.org",
        "患者张三，男，45岁，发热",
        "我叫王小明，咳嗽三天",
        "电话138 1234 5678",
        "家住北京市海淀区中关村大街27号",
        "主任医师王建国",
        "John Smith is a 45-year-old man",
    ],
)
def test_what_names_a_person_is_found(text):
    assert meta(text)["is_deidentified"] is False


@pytest.mark.parametrize(
    "text",
    [
        "洪某，男，45岁",
        "姓名：***",
        "姓名：某",
        "经主治医师查看，高主任医师会诊",
        "方主任查房",
        "查体：神清",
        "2021-04-26 ALT/AST 109/95，HBVDNA 3.06E+4，2020-7-14",
        "血压120/80mmHg，心率78次/分",
        "末次月经2021-03-05",
        "Name: ___",
        "a patient with Crohn disease",
        "WBC 12.5, platelets 250000",
        "患者高热，伴咳嗽",
        "患者白带多，色黄",
        "我是高血压，能吃西瓜吗",
        "患者王某，男，45岁",
        "The Patient is 45 years old",
    ],
)
def test_a_record_without_names_is_deidentified(text):
    assert meta(text)["is_deidentified"] is True


def test_what_the_file_says_stands_and_what_it_leaves_open_is_filled():
    given = {"risk_level": "严重", "complexity": 9, "specialty": "unknown", "lang_style": "", "is_deidentified": False}
    found = meta("胸痛2天", meta={**given, "own": [1]})
    sources = {
        "specialty": "rules",
        "lang_style": "rules",
        "risk_level": "file",
        "complexity": "file",
        "is_deidentified": "file",
    }
    assert found == {
        **given,
        "own": [1],
        "specialty": "cardiology",
        "lang_style": "standard",
        "sources": sources,
    }


def test_sources_stay_when_a_case_is_read_again():
    first = meta("胸痛2天")
    assert first["sources"] == dict.fromkeys(FIELDS, "rules")
    assert meta("胸痛2天", meta=first) == first


def test_a_case_of_the_textbook_says_so():
    found = meta("胸痛2天", gold_source="textbook", meta={"specialty": "cardiology"})
    assert (found["sources"]["specialty"], found["sources"]["risk_level"]) == ("textbook", "rules")


@pytest.mark.skipif(not REAL.exists(), reason="the real rows lie beside the project")
def test_the_real_rows_keep_their_metadata():
    for line in (REAL / "consult_qa.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found = meta(row["input"], "zh", meta=row["meta"])
        said = {key: value for key, value in row["meta"].items() if value != "unknown"}
        assert {key: found[key] for key in said} == said
        assert found["specialty"] != "unknown"
