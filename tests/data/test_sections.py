import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.sections import boilerplate, kinds, sections, stripped, without

RECORD = (
    "性别: 男\n年龄: 48\n主诉: 咳嗽3天\n现病史：3天前受凉后咳嗽。\n既往史: \n"
    "体格检查: 咽红。\n双肺清\n辅助检查: 诊断:1、咽炎"
)


def labelled(text):
    return [(part.label, part.body) for part in sections(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            RECORD,
            [
                ("性别", "男"),
                ("年龄", "48"),
                ("主诉", "咳嗽3天"),
                ("现病史", "3天前受凉后咳嗽。"),
                ("既往史", ""),
                ("体格检查", "咽红。\n双肺清"),
                ("辅助检查", "诊断:1、咽炎"),
            ],
        ),
        (
            "主诉：腹痛。现病史：2天前起病。既往史：体健。",
            [("主诉", "腹痛。"), ("现病史", "2天前起病。"), ("既往史", "体健。")],
        ),
        ("【主诉】腹痛\n【现病史】2天", [("主诉", "腹痛"), ("现病史", "2天")]),
        ("既往史: 体健流行病学史：无", [("既往史", "体健"), ("流行病学史", "无")]),
        ("既往史: 否认过敏史：无", [("既往史", "否认过敏史：无")]),
        ("主诉: [预问诊现病史]", [("主诉", "[预问诊现病史]")]),
        ("现病史: 好转。出院诊断：脑梗死", [("现病史", "好转。出院诊断：脑梗死")]),
        ("现病史: 腹痛。初步诊断：胃炎", [("现病史", "腹痛。"), ("初步诊断", "胃炎")]),
        ("诊断：胃炎", [("诊断", "胃炎")]),
        ("鉴别诊断：胃炎", []),
        (
            "Chief complaint: cough\nHPI: for 3 days\nPast Medical History:\nImpression: cold",
            [("Chief complaint", "cough"), ("HPI", "for 3 days"), ("Past Medical History", ""), ("Impression", "cold")],
        ),
        ("**Chief complaint:** cough\n## Allergies: none", [("Chief complaint", "cough"), ("Allergies", "none")]),
        ("- 主诉: 咳\n- 现病史: 3天", [("主诉", "咳"), ("现病史", "3天")]),
        (
            "Age: 45. Sex: male. Chief complaint: cough.",
            [("Age", "45."), ("Sex", "male."), ("Chief complaint", "cough.")],
        ),
        ("Differential diagnosis: asthma", []),
        ("the patient's age is 4", []),
        ("", []),
    ],
)
def test_sections(text, expected):
    assert labelled(text) == expected


def test_a_section_has_one_kind_in_both_languages():
    found = sections("查体: 好\n体格检查: 好\nPhysical examination: well\n【查体】好")
    assert {part.kind for part in found} == {"examination"}
    assert kinds(["查体", "Physical Examination", "examination", "My label"]) == {"examination", "my label"}


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("主诉: 咳\n辅助检查: 诊断:1、炎", ["辅助检查"], "主诉: 咳"),
        ("主诉: 咳\n辅助检查: 好\n过敏史: 无", ["Investigations"], "主诉: 咳\n过敏史: 无"),
        ("主诉: 咳\n辅助检查: 好", [], "主诉: 咳\n辅助检查: 好"),
        ("主诉: 咳", ["辅助检查"], "主诉: 咳"),
        ("辅助检查: 好", ["辅助检查"], ""),
        ("HPI: cough\nLabs: WBC 12\nPlan: rest", ["辅助检查", "plan"], "HPI: cough"),
        ("主诉: 咳\n出院小结：肺炎\n好转\n既往史: 无", ["出院小结"], "主诉: 咳\n既往史: 无"),
        ("CC: cough\n## Hospital course: fine\nDay 2 better\nRemark: x", ["hospital course"], "CC: cough\nRemark: x"),
        ("主诉: 出院小结：肺炎", ["出院小结"], "主诉: 出院小结：肺炎"),
    ],
)
def test_without(text, labels, expected):
    assert without(text, labels) == expected


COVID = "近28天内无高风险地区旅行史或居住史，"


def test_boilerplate_is_what_many_different_texts_say():
    texts = [f"主诉: {n}号病人说了不同的话。\n既往史: {COVID}" for n in "甲乙丙丁戊"]
    assert boilerplate(texts) == {"近天内无高风险地区旅行史或居住史"}
    assert boilerplate(texts[:4]) == frozenset()
    assert boilerplate(texts[:1] * 50) == frozenset()  # one text, however often
    assert boilerplate([*texts, *(f"第{n}个" for n in range(600))]) == frozenset()  # below 1 %


def test_a_latin_letter_counts_a_third():
    short, long = "no fever or chills", "no travel abroad in the last two weeks or so"
    texts = [f"{n}. {short}, {long}" for n in ("one", "two", "three", "four", "five")]
    assert boilerplate(texts) == {"notravelabroadinthelasttwoweeksorso"}


def test_stripped_leaves_what_tells_one_record_from_another():
    text = f"性别: 男\n年龄: 48\n主诉: 咳 嗽3天\n既往史: {COVID}有哮喘\n个人史: "
    assert stripped(text, {"近天内无高风险地区旅行史或居住史"}) == "咳嗽3天有哮喘"
    assert stripped("48岁男性，咳嗽，48-year-old", frozenset()) == "男性,咳嗽,"
    one, other = (f"性别: {sex}\n年龄: {age}\n主诉: 牙痛" for sex, age in (("男", 4), ("女", 88)))
    assert stripped(one, frozenset()) == stripped(other, frozenset())


@given(st.text(alphabet="主诉现病史既往诊断:：\n。 aAge[]【】1、无"))
def test_sections_never_overlap_and_lie_in_the_text(text):
    last = 0
    for part in sections(text):
        assert last <= part.start < part.end <= len(text)
        assert part.label in text[part.start : part.end]
        assert part.body in text[part.start : part.end]
        last = part.end
    assert without(text, ["nothing"]) == text


NAMES = """
性别 年龄 主诉 现病史 既往史 既往病史 手术史 外伤史 用药史 药物史 目前用药 个人史 吸烟史 饮酒史 过敏史
药物过敏史 婚育史 婚姻史 生育史 月经史 月经婚育史 家族史 流行病史 流行病学史 系统回顾 生命体征 体格检查
专科检查 专科情况 查体 辅助检查 实验室检查 影像学检查 检验检查 诊断 初步诊断 入院诊断 出院诊断 门诊诊断
急诊诊断 临床诊断 目前诊断 最终诊断 最后诊断 主要诊断 修正诊断 补充诊断 中医诊断 西医诊断 确定诊断 诊断意见
诊断考虑 印象 初步印象 拟诊 初诊 处理 处置 诊疗计划 治疗 医嘱 注意事项 Sex Gender Age CC HPI PMH ROS Vitals
Medications Allergies Investigations Labs Imaging Diagnosis Diagnoses Dx Impression Assessment A/P Plan
Treatment Recommendations Examination Epidemiology
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_is_known_at_the_start_of_a_line(name):
    assert labelled(f"主诉: 咳\n{name}：x") == [("主诉", "咳"), (name, "x")]
    assert labelled(f"主诉: 咳\n【{name}】x") == [("主诉", "咳"), (name, "x")]
