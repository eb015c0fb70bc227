import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from preceptor.core.records import Case, Consultation, Diagnosis, Evidence
from preceptor.data.check import LONGEST, check
from preceptor.data.leaks import leaks

REAL = Path(__file__).parents[3] / "shared" / "data"


def case(text, *diseases, **fields):
    gold = Diagnosis(diseases=diseases) if diseases else None
    return Case(id="1", text=text, language="zh", source="test", group="g", **{"gold": gold, **fields})


def found(text, **fields):
    kept, findings = check(case(text, **fields))
    return kept and kept.text, [(finding.reason, finding.action) for finding in findings]


def mojibake(text, encoding):
    return text.encode().decode(encoding, errors="replace")


@pytest.mark.parametrize(
    ("text", "kept", "findings"),
    [
        ("咳嗽3天", "咳嗽3天", []),
        ("", None, [("it is empty", "dropped")]),
        (" \n\t", None, [("it is empty", "dropped")]),
        ("\x00\x01", None, [("it holds no words", "dropped")]),
        ("。。--", None, [("it holds no words", "dropped")]),
        ("主诉: \n现病史: -\n既往史: 。", None, [("it holds nothing but empty sections", "dropped")]),
        ("x" * LONGEST, "x" * LONGEST, []),
        ("x" * (LONGEST + 1), None, [("100001 characters; a record has at most 100000", "dropped")]),
        ("咳\x00嗽\x07\u200b3天\t\n", "咳嗽3天\t\n", [("3 control or invisible characters", "changed")]),
        ("a\u202eb", "ab", [("1 control or invisible characters", "changed")]),
        ("咳嗽\ufffd三天", "咳嗽\ufffd三天", [("1 characters come out of a wrong encoding", "kept")]),
        ("\ufffd" * 9 + "咳", None, [("9 of its characters come out of a wrong encoding", "dropped")]),
        ("鍙戠儹", None, [("3 of its characters come out of a wrong encoding", "dropped")]),
        ("å‘çƒ\xad", None, [("5 of its characters come out of a wrong encoding", "dropped")]),
        (
            "体温正常，患者鍙戠儹",  # a whole run counts, for nobody can tell where it turned bad
            "体温正常，患者鍙戠儹",
            [],
        ),
        ("cafÃ© with a friend", "cafÃ© with a friend", [("2 characters come out of a wrong encoding", "kept")]),
        ("体健，38℃，×10⁹/L，β±Ω", "体健，38℃，×10⁹/L，β±Ω", []),
        ("Sjögren’s – Ménière, 38 °C", "Sjögren’s – Ménière, 38 °C", []),
        ("發熱三天，喉嚨痛", "發熱三天，喉嚨痛", []),
        (
            "主诉: 咳\n既往史: \n个人史: -\n过敏史: 无",
            "主诉: 咳\n既往史: \n个人史: -\n过敏史: 无",
            [("empty sections: 既往史, 个人史", "kept")],
        ),
    ],
)
def test_a_text_is_kept_mended_or_dropped(text, kept, findings):
    assert found(text) == (kept, findings)


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "cp1252"])
def test_a_record_in_the_wrong_encoding_is_dropped(encoding):
    text, findings = found(mojibake("患者三天前无明显诱因出现发热，最高三十九度，伴咳嗽咳痰。", encoding))
    assert text is None
    assert findings[0][0].endswith("of its characters come out of a wrong encoding")


STATED = [
    ("辅助检查: 诊断:1、糖尿病", (), "辅助检查"),
    ("辅助检查: 无诊断:1、焦虑障碍", (), "辅助检查"),
    ("辅助检查: 提示甲状腺结节诊断:1、甲状腺结节2、贫血", (), "辅助检查"),
    ("婚育史: 诊断:1、跖疣", (), "婚育史"),
    ("现病史: 外院诊断为“肺栓塞”，转我院", ("肺栓塞",), "现病史"),
    ("现病史: 当地医院CT提示肺栓塞", ("肺栓塞",), "现病史"),
    ("现病史: 确诊肺栓塞2天", ("肺栓塞",), "现病史"),
    ("初步诊断：肺炎", (), "初步诊断"),
    ("入院诊断: 不明原因发热", (), "入院诊断"),
    ("主诉：咳嗽3天。初步诊断：急性支气管炎。", (), "初步诊断"),
    ("现病史：反复上腹痛。入院诊断：十二指肠溃疡", (), "现病史"),
    ("【初步诊断】\n1. 高血压病3级\n2. 冠心病", (), "初步诊断"),
    ("体格检查：心肺（-）\n诊断 ：上呼吸道感染", (), "诊断"),
    ("诊断为：急性胃炎", (), "text"),
    ("诊断：无菌性脑膜炎", (), "诊断"),
    ("辅助检查：喉部检查:诊断内容: 声带息肉", (), "辅助检查"),
    ("临床诊断：偏头痛", (), "临床诊断"),
    ("中医诊断：胃脘痛", (), "中医诊断"),
    ("西医诊断:湿疹", (), "西医诊断"),
    ("印象：脑梗死", (), "印象"),
    ("诊断编码：E11.9", (), "text"),
    ("ICD-10: J18.9", (), "text"),
    ("现病史：门诊以“肺炎”收入我科", (), "现病史"),
    ("现病史：1年前起病，门诊以“神经性耳鸣”收住我科", (), "现病史"),
    ("现病史：拟“急性阑尾炎”收住院", (), "现病史"),
    ("主诉: 临床诊断为克罗恩病", (), "主诉"),
    ("综合上述，考虑为带状疱疹。", (), "text"),
    ("根据症状体征，考虑诊断为痛风", (), "text"),
    ("Diagnosis: pneumonia", (), "Diagnosis"),
    ("Diagnosis: normal pressure hydrocephalus", (), "Diagnosis"),
    ("Impression: acute appendicitis", (), "Impression"),
    ("Assessment and Plan: pneumonia, start antibiotics", (), "Assessment and Plan"),
    ("Dx: COPD exacerbation", (), "Dx"),
    ("A/P: 1. Asthma", (), "A/P"),
    ("Final Diagnosis:\n1. Stroke", (), "Final Diagnosis"),
    ("HPI: fever. Diagnosis: sepsis", (), "HPI"),
    ("The final diagnosis was acute pancreatitis.", (), "text"),
    ("She was admitted with a diagnosis of cellulitis.", (), "text"),
    ("Findings are consistent with a diagnosis of psoriasis.", (), "text"),
    ("主诉: 皮炎失眠高尿酸血症", ("皮炎",), "主诉"),
    ("现病史：多次B超提示PCO，诊断PCOS。", ("多囊卵巢综合征（PCOS）",), "现病史"),
    ("现病史：咳嗽，CT示右下肺炎", ("肺炎",), "现病史"),
    ("主诉: 血压高，高血压1级", ("高血压（1级）",), "主诉"),
    ("现病史：考虑急 性阑尾 炎", ("急性阑尾炎",), "现病史"),
    ("HPI: likely pneumonia.", ("Pneumonia",), "HPI"),
    ("HPI: Exam suggests gall\nstones.", ("gall stones",), "HPI"),
    ("性别: 男；年龄: 22；主诉: 发热2天；现病史: 咳嗽；既往史: 高血压；诊断: 肺炎", [], "既往史"),
    ("患者男，45岁，咳嗽3天。既往史：高血压。诊断：肺炎。", [], "既往史"),
    ("10年前行阑尾手术，现咳嗽3天，诊断：肺炎", [], "text"),
    ("Past history: asthma. Diagnosis: pneumonia.", [], "Past history"),
    ("主诉: 咳\n诊断\n1.肺炎\n2.高血压", [], "诊断"),
    ("主诉: 咳\n# 诊断\n肺炎", [], "诊断"),
    ("Complaint: cough\n## Diagnosis\nPneumonia", [], "Diagnosis"),
    ("Complaint: cough\nDIAGNOSIS\n1. Pneumonia", [], "DIAGNOSIS"),
    ("主诉: 咳\n诊  断：急性咽炎", [], "诊  断"),
    ("主诉: 咳\n诊 断: 急性咽炎", [], "诊 断"),
    ("主诉: 咳\n入院诊断（主要）：急性咽炎", [], "入院诊断"),
    ("主诉: 咳\n诊断(ICD-10): J02.9 急性咽炎", [], "诊断"),
    ("HPI: cough\nPrimary diagnosis (ICD-10 J18.9): Pneumonia", [], "Primary diagnosis"),
    ("主诉: 咳\n诊断\t肺炎", [], "诊断"),
    ("主诉: 咳\n| 诊断 | 肺炎 |", [], "诊断"),
    ('主诉: 咳\n"诊断": "肺炎"', [], "诊断"),
    ("主诉: 咳\n疾病名称：肺炎", [], "疾病名称"),
    ("主诉: 咳\n病名：肺炎", [], "病名"),
    ("主诉: 咳\n门诊诊断 急性咽炎", [], "门诊诊断"),
    ("HPI: cough\nFinal Dx - Pneumonia", [], "Final Dx"),
    ("HPI: cough\nAdmitting diagnosis Pneumonia", [], "Admitting diagnosis"),
    ("现病史: 病人诊断2型糖尿病，因病情需要", [], "现病史"),
    ("现病史: 患者诊断慢性肾衰竭，规律", [], "现病史"),
    ("现病史: 贫血，遂至我院门诊，诊断缺铁性贫血，予补充", [], "现病史"),
    ("现病史: 今日门诊CT示阑尾增粗，诊断急性阑尾炎。", [], "现病史"),
    ("现病史: 咳嗽，门诊以肺炎收入我科", [], "现病史"),
    ("HPI: He was diagnosed with pneumonia today.", [], "HPI"),
]
NOT_STATED = [
    ("既往史: 糖尿病病史10年", "糖尿病"),
    ("现病史: 糖尿病病史10年", "糖尿病"),
    ("主诉: 糖尿病10年", "糖尿病"),
    ("主诉: 发现前列腺癌10年", "前列腺癌"),
    ("否认糖尿病、高血压病史", "糖尿病"),
    ("现病史: 无肺炎", "肺炎"),
    ("排除肺炎", "肺炎"),
    ("肺炎待排", "肺炎"),
    ("患者担心肺炎", "肺炎"),
    ("接种过肺炎疫苗", "肺炎"),
    ("与新冠肺炎确诊病例无接触史", "肺炎"),
    ("母亲患糖尿病", "糖尿病"),
    ("3年前因肺炎住院", "肺炎"),
    ("曾诊断多囊卵巢综合征", "多囊卵巢综合征"),
    ("现病史：10年前诊断为糖尿病", "糖尿病"),
    ("主诉: 发热10天", "发热"),
    ("主诉: 头痛", "头痛待查"),
    ("行诊断性刮宫", ""),
    ("建议诊断后再决定治疗", ""),
    ("鉴别诊断：肺结核", ""),
    ("诊断：待查", ""),
    ("诊断: ", ""),
    ("诊断：无", ""),
    ("诊断:正常", ""),
    ("初步诊断：", ""),
    ("诊断不明，转我院", ""),
    ("诊断依据：1.发热", ""),
    ("诊断时间：2019年", ""),
    ("诊断学检查：已完善", ""),
    ("超声诊断：脂肪肝", ""),
    ("辅助检查：CT诊断：肺部感染", ""),
    ("病理诊断：腺癌", ""),
    ("术前诊断：疝", ""),
    ("外院诊断：胃炎，治疗无效", ""),
    ("现病史: 去年出院诊断：脑梗死", ""),
    ("既往史: 诊断：高血压", ""),
    ("过敏史: 诊断：青霉素过敏", ""),
    ("流行病史: 室友肺炎\n家族史: 肺炎", "肺炎"),
    ("无被确诊为新型冠状病毒感染者", ""),
    ("现病史: 以“腹痛”收入院", ""),
    ("现病史: 1周前外院以“肺炎”收入院", ""),
    ("检查结论:1、窦性心律", ""),
    ("结论：右颈动脉狭窄", ""),
    ("最可能的诊断是什么？", ""),
    ("Diagnosis: unknown", ""),
    ("Diagnosis: pending", ""),
    ("Assessment: stable", ""),
    ("Differential diagnosis: asthma", ""),
    ("Date of diagnosis: 2019", ""),
    ("Age at diagnosis: 45", ""),
    ("Nursing diagnosis: pain", ""),
    ("HPI: cough. Chest X-ray done. Impression: right lower lobe opacity", ""),
    ("What is the most likely diagnosis?", ""),
    ("The diagnosis was unclear.", ""),
    ("No diagnosis was made.", ""),
    ("The diagnostic workup was negative.", ""),
    ("现病史: 确诊肺栓塞2年", "肺栓塞"),
    ("现病史: 3年前外院诊断肺栓塞", "肺栓塞"),
    ("现病史: 外院诊断肺栓塞", ""),
    ("Family history: breast cancer", "Breast cancer"),
    ("Mother had breast cancer", "breast cancer"),
    ("No evidence of pneumonia", "pneumonia"),
    ("History of asthma since childhood", "asthma"),
    ("Known hypertension for 10 years", "hypertension"),
    ("She was diagnosed with diabetes 5 years ago", "diabetes"),
    ("Rule out appendicitis", "appendicitis"),
    ("Pulmonary embolism was ruled out", "pulmonary embolism"),
    ("pneumonia vaccine last month", "pneumonia"),
    ("worried about lung cancer", "lung cancer"),
    ("HPI: fever for 3 days", "Fever"),
    ("HPI: Diagnosed with hypertension in 2010.", ""),
    ("诊断: 见病历", ""),
    ("初诊：是", ""),
    ("现病史: 2年前于外院就诊，诊断高血压", ""),
    ("现病史: 患者10年前诊断系统性红斑狼疮，后期", ""),
    ("既往史: 13年前诊断2型糖尿病，6年前诊断“冠心病”，于", ""),
    ("现病史: 无痛经，曾诊断多囊卵巢综合征。", ""),
    ("门诊以“胸痛待查”收入院", ""),
    ("现病史: 门诊以胸痛收入我科", ""),
    ("现病史: 母亲诊断乳腺癌", ""),
    ("他被诊断书吓到了", ""),
    ("HPI: Was diagnosed with asthma in childhood.", ""),
    ("现病史: 为明确诊断来院", ""),
    ("现病史: 患者要求明确诊断，门诊诊断不明", ""),
    ("治疗\t见上", ""),
]


@pytest.mark.parametrize(("text", "gold", "section"), STATED)
def test_the_answer_is_stated(text, gold, section):
    kept, findings = check(case(text, *gold))
    assert kept.meta["leaks"] == [section]
    assert [finding.action for finding in findings if "the answer is stated" in finding.reason] == ["kept"]


@pytest.mark.parametrize(("text", "gold"), NOT_STATED)
def test_the_answer_is_not_stated(text, gold):
    assert leaks(text, [gold] if gold else []) == []


def test_a_label_of_several_lines_goes_whole():
    kept, _ = check(case("现病史: 咳三天。诊断:肺炎\n2.高血压\n3.糖尿病\n既往史: 无"), ["诊断"])
    assert (kept.text, "leaks" in kept.meta) == ("现病史: 咳三天。\n既往史: 无", False)


LEAKING = "主诉: 多饮\n现病史: 1月前起病。\n辅助检查: 血糖11。诊断:1、糖尿病"


@pytest.mark.parametrize(
    ("drop", "text", "leaking"),
    [
        ([], LEAKING, ["辅助检查"]),
        (["辅助检查"], "主诉: 多饮\n现病史: 1月前起病。", None),
        (["Investigations"], "主诉: 多饮\n现病史: 1月前起病。", None),
        (["诊断"], "主诉: 多饮\n现病史: 1月前起病。\n辅助检查: 血糖11。", None),
        (["现病史"], "主诉: 多饮\n辅助检查: 血糖11。诊断:1、糖尿病", ["辅助检查"]),
    ],
)
def test_sections_that_leak_can_be_dropped(drop, text, leaking):
    kept, findings = check(case(LEAKING, "糖尿病", meta={"leaks": ["old"], "other": 1}), drop)
    assert kept.text == text
    assert kept.meta == ({"other": 1, "leaks": leaking} if leaking else {"other": 1})
    action = "kept" if leaking else "changed"
    assert (f"the answer is stated in 辅助检查: {'诊断:1、糖尿病'}", action) in [(f.reason, f.action) for f in findings]


def test_a_dropped_section_is_never_silent():
    kept, findings = check(case("主诉: 咳\n辅助检查: 无特殊"), ["辅助检查"])
    assert kept.text == "主诉: 咳"
    assert [(f.reason, f.action) for f in findings] == [("dropped sections: 辅助检查", "changed")]


def test_a_case_that_is_all_answer_is_dropped():
    kept, findings = check(case("诊断: 糖尿病"), ["诊断"])
    assert kept is None
    assert [finding.action for finding in findings] == ["changed", "dropped"]


def test_evidence_goes_when_its_places_change():
    gold = Diagnosis(diseases=("感冒",), evidence=(Evidence(text="咳", start=1, end=2),))
    assert check(case("\x00咳", gold=gold))[0].gold.evidence == ()
    assert check(case("咳", gold=gold))[0].gold.evidence == gold.evidence


def test_a_question_may_say_what_the_disease_is():
    kept, findings = check(case("诊断：肺炎。怎么治？", gold=Consultation(answer="休息")))
    assert (kept.meta, findings) == ({}, [])


PIECES = st.sampled_from(
    [
        "诊断",
        "：",
        ":",
        "1、",
        "肺炎",
        "\n",
        "主诉",
        "既往史",
        "无",
        "以“",
        "”收住院",
        "Diagnosis",
        " ",
        "\x00",
        "鍙戠儹",
        "x",
        "。",
        "\ufffd",
    ]
)


@given(st.lists(PIECES).map("".join), st.sampled_from([[], ["诊断"], ["主诉"], ["辅助检查", "x"]]))
@example("诊断诊断：诊断\n肺炎", ["诊断"])
def test_no_text_breaks_the_check_and_nothing_is_lost_silently(text, drop):
    kept, findings = check(case(text, "肺炎"), drop)
    if kept is None:
        assert findings[-1].action == "dropped"
        return
    assert all(finding.action != "dropped" for finding in findings)
    assert kept.text == text or any(finding.action == "changed" for finding in findings)
    for leak in leaks(text, ["肺炎"]):
        assert 0 <= leak.start < leak.end <= len(text)
    again, _ = check(kept, drop)
    assert again is not None
    assert again.text == kept.text


@pytest.mark.skipif(not REAL.exists(), reason="the real cases lie beside the project")
def test_the_real_cases_that_leak():
    rows = [json.loads(line) for line in (REAL / "healthai_cases.jsonl").read_text("utf-8").splitlines()]
    flagged = {row["id"] for row in rows if leaks(row["feature_content"])}
    appended = {row["id"] for row in rows if "诊断:1" in row["feature_content"]}
    assert appended <= flagged
    assert len(flagged) <= len(appended) + 15
