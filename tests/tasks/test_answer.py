"""Replies as models and people write them are read, or it is said why not; work is bounded."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.core.records import Diagnosis, FailureKind
from preceptor.tasks.answer import Outcome, parse

CLEAN, REPAIRED = Outcome.CLEAN, Outcome.REPAIRED
NESTED = json.dumps({"诊断": "1. 高尿酸血症；2. 皮炎", "诊断依据": "1. 尿酸升高；\n2. 皮疹3天"}, ensure_ascii=False)
SHAPES: list[tuple[str, Outcome, list[str], list[str]]] = [
    # strict JSON, wherever it stands
    ('{"diseases": ["肺炎"], "reason": ["发热3天"]}', CLEAN, ["肺炎"], ["发热3天"]),
    ('{"diseases": ["Asthma"], "reason": ["wheeze", "cough"]}', CLEAN, ["Asthma"], ["wheeze", "cough"]),
    ('{"diseases": []}', CLEAN, [], []),
    ('{"diseases": [], "reason": []}', CLEAN, [], []),
    ('{"diseases": null, "reason": ["记录太少"]}', CLEAN, [], ["记录太少"]),
    ('{"diseases": "", "reason": ""}', CLEAN, [], []),
    ('{"diseases": ["无法诊断"]}', CLEAN, [], []),
    ('{"diseases": "None"}', CLEAN, [], []),
    ('```json\n{"diseases": ["肺炎"], "reason": ["发热"]}\n```', CLEAN, ["肺炎"], ["发热"]),
    ('```\n{"diseases": ["肺炎"]}\n```', CLEAN, ["肺炎"], []),
    ('```json\n{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('好的，以下是诊断：\n{"diseases": ["肺炎"]}\n希望对您有帮助。', CLEAN, ["肺炎"], []),
    ('Sure! Here {is} it: {"diseases": ["Asthma"]} Take care.', CLEAN, ["Asthma"], []),
    ('根据记录[1]：```json\n{"diseases":["肺炎"]}\n```以上。', CLEAN, ["肺炎"], []),
    ('["肺炎", "哮喘"]', CLEAN, ["肺炎", "哮喘"], []),
    ('```json\n["肺炎"]\n```', CLEAN, ["肺炎"], []),
    (
        '[{"disease": "肺炎", "reason": "发热"}, {"disease": "哮喘", "reason": ["气喘"]}]',
        CLEAN,
        ["肺炎", "哮喘"],
        ["发热", "气喘"],
    ),
    ('结果如下 [{"disease": "肺炎"}, {"disease": "哮喘"}]', CLEAN, ["肺炎", "哮喘"], []),
    (
        '{"diseases": [{"name": "肺炎", "reason": ["发热"]}, {"name": "哮喘"}]}',
        CLEAN,
        ["肺炎", "哮喘"],
        ["发热"],
    ),
    (
        '{"diseases": {"肺炎": ["发热", "咳嗽"], "哮喘": "气喘"}}',
        CLEAN,
        ["肺炎", "哮喘"],
        ["发热", "咳嗽", "气喘"],
    ),
    ('{"diseases": {"肺炎": 0.8}}', CLEAN, ["肺炎"], []),
    ('{"diseases": ["肺炎"], "reason": {"肺炎": ["发热"]}}', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": [{"text": "发热"}]}', CLEAN, ["肺炎"], ["发热"]),
    # other keys
    ('{"disease": "肺炎", "reasons": "发热"}', CLEAN, ["肺炎"], ["发热"]),
    ('{"Diagnosis": ["Asthma"], "Evidence": ["wheeze"]}', CLEAN, ["Asthma"], ["wheeze"]),
    ('{"final_diagnosis": "Asthma", "rationale": "wheeze"}', CLEAN, ["Asthma"], ["wheeze"]),
    ('{"诊断": "肺炎", "诊断依据": "发热"}', CLEAN, ["肺炎"], ["发热"]),
    ('{"疾病": ["肺炎"], "依据": ["发热"]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"初步诊断": "肺炎；哮喘", "理由": "1、发热 2、气喘"}', CLEAN, ["肺炎", "哮喘"], ["发热", "气喘"]),
    # wrapped and nested
    (json.dumps({"id": 3, "bingli_json": NESTED}), CLEAN, ["高尿酸血症", "皮炎"], ["尿酸升高", "皮疹3天"]),
    (json.dumps(NESTED), CLEAN, ["高尿酸血症", "皮炎"], ["尿酸升高", "皮疹3天"]),
    ('{"answer": {"diseases": ["肺炎"]}}', CLEAN, ["肺炎"], []),
    ('{"result": [{"诊断": "肺炎"}]}', CLEAN, ["肺炎"], []),
    ('{"diseases": "[\\"肺炎\\", \\"哮喘\\"]"}', CLEAN, ["肺炎", "哮喘"], []),
    (
        '{"bingli_json": "{\\"诊断\\": \\"肺炎\\", \\"诊断依据\\": \\"1. 发热；\n2. 咳嗽\\"}"}',
        REPAIRED,
        ["肺炎"],
        ["发热", "咳嗽"],
    ),
    # the competition's strings
    (
        '{"diseases": "1. 高尿酸血症；2. 皮炎", "reason": "1. 尿酸升高；\\n2. 皮疹"}',
        CLEAN,
        ["高尿酸血症", "皮炎"],
        ["尿酸升高", "皮疹"],
    ),
    ('{"diseases": ["1. 高尿酸血症；2. 皮炎"]}', CLEAN, ["高尿酸血症", "皮炎"], []),
    (
        '{"diseases": ["1. 高尿酸血症", "2. 皮炎"], "reason": ["1. 尿酸升高", "2. 皮疹"]}',
        CLEAN,
        ["高尿酸血症", "皮炎"],
        ["尿酸升高", "皮疹"],
    ),
    ('{"diseases": "高血压，糖尿病"}', CLEAN, ["高血压", "糖尿病"], []),
    ('{"diseases": "高血压、糖尿病"}', CLEAN, ["高血压", "糖尿病"], []),
    ('{"diseases": "Asthma, pneumonia"}', CLEAN, ["Asthma", "pneumonia"], []),
    ('{"diseases": ["Diabetes mellitus, type 2"]}', CLEAN, ["Diabetes mellitus, type 2"], []),
    ('{"diseases": "1.2型糖尿病；2.高血压"}', CLEAN, ["2型糖尿病", "高血压"], []),
    (
        '{"diseases": ["肺炎"], "reason": ["体温38.5℃，WBC 12.3；CRP 45"]}',
        CLEAN,
        ["肺炎"],
        ["体温38.5℃，WBC 12.3；CRP 45"],
    ),
    # thinking, several objects
    ('<think>也许是{"diseases": ["哮喘"]}</think>{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('maybe asthma</think>\n{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('<thinking>hm</thinking>\n```json\n{"diseases": ["肺炎"]}\n```', CLEAN, ["肺炎"], []),
    ('{"diseases": ["哮喘"]} 更正：{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('{"diseases": ["肺炎"]}\n{"reason": ["发热"]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"reason": ["发热"]}\n{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], ["发热"]),
    # broken JSON
    ("{'diseases': ['肺炎'], 'reason': ['发热']}", REPAIRED, ["肺炎"], ["发热"]),
    ("{'diseases': ['Crohn's disease']}", REPAIRED, ["Crohn’s disease"], []),
    ('{"diseases": ["肺炎",], "reason": ["发热",],}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"] "reason": ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{diseases: ["肺炎"], reason: ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": ["发热"]', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": ["患者"发热"3天"]}', REPAIRED, ["肺炎"], ['患者"发热"3天']),
    ('{"diseases": ["肺炎"], "reason": "发热\n咳嗽"}', REPAIRED, ["肺炎"], ["发热", "咳嗽"]),
    ('{"diseases": ["肺炎"], // 主要\n "reason": ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ("{“diseases”：[“肺炎”，“哮喘”]，“reason”：[“发热”]}", REPAIRED, ["肺炎", "哮喘"], ["发热"]),
    ("｛“diseases”：［“肺炎”］，“reason”：［“发热”］｝", REPAIRED, ["肺炎"], ["发热"]),
    ("```json\n{'diseases': ['肺炎']}\n```\n以上仅供参考", REPAIRED, ["肺炎"], []),
    # tags
    ("<disease>肺炎</disease><reason>1. 发热；2. 咳嗽</reason>", REPAIRED, ["肺炎"], ["发热", "咳嗽"]),
    (
        "<disease>肺炎</disease>\n<disease>哮喘</disease>\n<reason>发热</reason>",
        REPAIRED,
        ["肺炎", "哮喘"],
        ["发热"],
    ),
    ("<disease>1. 肺炎；2. 哮喘</disease><reason>发热", REPAIRED, ["肺炎", "哮喘"], ["发热"]),
    ("<disease></disease>", REPAIRED, [], []),
    # labelled text
    ("诊断：肺炎\n诊断依据：1. 发热；2. 咳嗽", REPAIRED, ["肺炎"], ["发热", "咳嗽"]),
    ("**初步诊断**：1. 肺炎；2. 哮喘\n\n**依据**：发热；气喘", REPAIRED, ["肺炎", "哮喘"], ["发热", "气喘"]),
    ("根据病史，诊断为肺炎。依据：发热", REPAIRED, ["肺炎"], ["发热"]),
    ("### 诊断结果:\n1. 肺炎\n2. 哮喘\n\n以上供参考。", REPAIRED, ["肺炎", "哮喘"], []),
    (
        "Diagnosis: Asthma\nEvidence: wheeze; cough at night",
        REPAIRED,
        ["Asthma"],
        ["wheeze", "cough at night"],
    ),
    ("The diagnosis is pneumonia.", REPAIRED, ["pneumonia"], []),
    # bare names in every numbering
    ("肺炎", REPAIRED, ["肺炎"], []),
    ("Acute appendicitis.", REPAIRED, ["Acute appendicitis"], []),
    ("1. 高尿酸血症；2. 皮炎", REPAIRED, ["高尿酸血症", "皮炎"], []),
    ("1.高血压2.糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("1、高血压 2、糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("1) Asthma 2) Pneumonia", REPAIRED, ["Asthma", "Pneumonia"], []),
    ("（1）高血压（2）糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("①高血压②糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("１．高血压；２．糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("一、高血压；二、糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("- 高血压\n- 糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ("高血压；糖尿病；", REPAIRED, ["高血压", "糖尿病"], []),
    ("高血压，糖尿病", REPAIRED, ["高血压", "糖尿病"], []),
    ('"肺炎"', REPAIRED, ["肺炎"], []),
    ("无法诊断", REPAIRED, [], []),
    # as above, in forms met later: wrappings, tokens of templates, headings, tables, keys, numberings
    ('\ufeff{"diseases": ["肺炎"], "reason": ["发热"]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": ["\\u80ba\\u708e"], "reason": ["\\u53d1\\u70ed"]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": ["发热"]}<|im_end|>', CLEAN, ["肺炎"], ["发热"]),
    ("肺炎<|im_end|>", REPAIRED, ["肺炎"], []),
    ("肺炎</s>", REPAIRED, ["肺炎"], []),
    ("Asthma<|eot_id|>", REPAIRED, ["Asthma"], []),
    ("<|im_start|>assistant\n诊断：肺炎<|im_end|>", REPAIRED, ["肺炎"], []),
    ('{"diseases": ["肺炎"], "reason": ["发热"]}<|endoftext|>\n\nHuman: next', CLEAN, ["肺炎"], ["发热"]),
    ('~~~json\n{"diseases": ["肺炎"]}\n~~~', CLEAN, ["肺炎"], []),
    ('````json\n{"diseases": ["肺炎"]}\n````', CLEAN, ["肺炎"], []),
    ('```JSON\n{"diseases": ["肺炎"]}\n```', CLEAN, ["肺炎"], []),
    ('```python\nresult = {"diseases": ["肺炎"]}\n```', CLEAN, ["肺炎"], []),
    ("```python\nresult = {'diseases': ['肺炎'], 'reason': None}\n```", REPAIRED, ["肺炎"], []),
    (
        '```json\n{\n  // 主要诊断\n  "diseases": ["肺炎"], # 次要\n  /* x */ "reason": ["发热"]\n}\n```',
        REPAIRED,
        ["肺炎"],
        ["发热"],
    ),
    ('{"diseases": ["肺炎"]}\n{"diseases": ["哮喘"]}', CLEAN, ["哮喘"], []),
    (
        '{"disease": "肺炎", "reason": "发热"}\n{"disease": "哮喘", "reason": "气喘"}',
        CLEAN,
        ["肺炎", "哮喘"],
        ["发热", "气喘"],
    ),
    ('{"diseases": ["肺炎"], "reason": ["发热"]}{"diseases": ["肺炎"], "reason": ["发热"]}', CLEAN, ["肺炎"], ["发热"]),
    ("诊断：\n- 肺炎\n- 哮喘\n\n依据：\n- 发热\n- 气喘", REPAIRED, ["肺炎", "哮喘"], ["发热", "气喘"]),
    ("## 诊断\n1. 肺炎\n2. 哮喘\n\n## 诊断依据\n1. 发热\n2. 气喘", REPAIRED, ["肺炎", "哮喘"], ["发热", "气喘"]),
    (
        "# Diagnosis\n\n1. Asthma\n2. Pneumonia\n\n# Evidence\n\n- wheeze\n- cough",
        REPAIRED,
        ["Asthma", "Pneumonia"],
        ["wheeze", "cough"],
    ),
    ("**Diagnosis:** Asthma\n\n**Reason:** wheeze", REPAIRED, ["Asthma"], ["wheeze"]),
    ("**诊断结果**\n肺炎\n\n**诊断依据**\n发热", REPAIRED, ["肺炎"], ["发热"]),
    ("【诊断】肺炎\n【依据】发热", REPAIRED, ["肺炎"], ["发热"]),
    ("【诊断】\n肺炎\n【诊断依据】\n1、发热\n2、咳嗽", REPAIRED, ["肺炎"], ["发热", "咳嗽"]),
    ("| 诊断 | 依据 |\n| --- | --- |\n| 肺炎 | 发热 |\n| 哮喘 | 气喘 |", REPAIRED, ["肺炎", "哮喘"], ["发热", "气喘"]),
    ("| Disease | Reason |\n|---|---|\n| Asthma | wheeze |", REPAIRED, ["Asthma"], ["wheeze"]),
    ("diseases: 肺炎\nreason: 发热", REPAIRED, ["肺炎"], ["发热"]),
    ("diseases:\n  - 肺炎\n  - 哮喘\nreason:\n  - 发热\n  - 气喘", REPAIRED, ["肺炎", "哮喘"], ["发热", "气喘"]),
    ("diseases: [肺炎, 哮喘]\nreason: [发热]", REPAIRED, ["肺炎", "哮喘"], ["发热"]),
    (
        "Diseases: Asthma, Pneumonia\nReasons:\n1. wheeze\n2. fever",
        REPAIRED,
        ["Asthma", "Pneumonia"],
        ["wheeze", "fever"],
    ),
    ("diseases = ['肺炎']\nreason = ['发热']", REPAIRED, ["肺炎"], ["发热"]),
    ('"diseases": ["肺炎"], "reason": ["发热"]', REPAIRED, ["肺炎"], ["发热"]),
    ("<diagnosis>肺炎</diagnosis>", REPAIRED, ["肺炎"], []),
    (
        "<diseases><disease>肺炎</disease><disease>哮喘</disease></diseases><reasons><reason>发热</reason></reasons>",
        REPAIRED,
        ["肺炎", "哮喘"],
        ["发热"],
    ),
    ('<answer>{"diseases": ["肺炎"]}</answer>', CLEAN, ["肺炎"], []),
    ("<answer>肺炎</answer>", REPAIRED, ["肺炎"], []),
    ("<answer>1. 肺炎；2. 哮喘</answer>", REPAIRED, ["肺炎", "哮喘"], []),
    ("<诊断>肺炎</诊断><依据>发热</依据>", REPAIRED, ["肺炎"], ["发热"]),
    ("<Disease>Asthma</Disease>", REPAIRED, ["Asthma"], []),
    ("\\boxed{肺炎}", REPAIRED, ["肺炎"], []),
    ("最终答案：\\boxed{肺炎}", REPAIRED, ["肺炎"], []),
    ("<result><disease>肺炎</disease></result>", REPAIRED, ["肺炎"], []),
    ("1. 肺炎\n2. 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("1) 肺炎\n2) 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("1、肺炎\n2、哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("(1) 肺炎 (2) 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("⑴肺炎⑵哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("一、肺炎\n二、哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("（一）肺炎\n（二）哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("a. 肺炎\nb. 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("• 肺炎\n• 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("· 肺炎\n· 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("* 肺炎\n* 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("+ 肺炎\n+ 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("1: 肺炎\n2: 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("第一，肺炎；第二，哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("1 肺炎\n2 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("#1 Asthma\n#2 Pneumonia", REPAIRED, ["Asthma", "Pneumonia"], []),
    ("肺炎 | 哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("肺炎\n哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("肺炎。", REPAIRED, ["肺炎"], []),
    ("“肺炎”", REPAIRED, ["肺炎"], []),
    ("《肺炎》", REPAIRED, ["肺炎"], []),
    ("`肺炎`", REPAIRED, ["肺炎"], []),
    ("**肺炎**", REPAIRED, ["肺炎"], []),
    ("肺炎（可能性大）", REPAIRED, ["肺炎（可能性大）"], []),
    ("肺炎?", REPAIRED, ["肺炎?"], []),
    ("疑似肺炎", REPAIRED, ["疑似肺炎"], []),
    ("考虑肺炎", REPAIRED, ["考虑肺炎"], []),
    ("肺炎待查", REPAIRED, ["肺炎待查"], []),
    ("诊断为肺炎", REPAIRED, ["肺炎"], []),
    ("诊断为：肺炎。", REPAIRED, ["肺炎"], []),
    ("初步诊断为肺炎、哮喘", REPAIRED, ["肺炎", "哮喘"], []),
    ("考虑诊断：肺炎", REPAIRED, ["肺炎"], []),
    ("印象：肺炎", REPAIRED, ["肺炎"], []),
    ("Impression: Asthma", REPAIRED, ["Asthma"], []),
    ("Assessment: Asthma", REPAIRED, ["Asthma"], []),
    ("Answer: Asthma", REPAIRED, ["Asthma"], []),
    ("答案：肺炎", REPAIRED, ["肺炎"], []),
    ("答：肺炎", REPAIRED, ["肺炎"], []),
    ("最可能的诊断是肺炎", REPAIRED, ["肺炎"], []),
    ("最可能的诊断：肺炎", REPAIRED, ["肺炎"], []),
    ("该患者诊断为肺炎。", REPAIRED, ["肺炎"], []),
    ("患者最可能的诊断是社区获得性肺炎。", REPAIRED, ["社区获得性肺炎"], []),
    ("The most likely diagnosis is asthma.", REPAIRED, ["asthma"], []),
    ("Most likely diagnosis: asthma", REPAIRED, ["asthma"], []),
    ("Final diagnosis: Asthma.\nReason: wheeze.", REPAIRED, ["Asthma"], ["wheeze"]),
    ("Differential diagnosis: asthma, COPD\nFinal diagnosis: asthma", REPAIRED, ["asthma"], []),
    ("鉴别诊断：哮喘\n诊断：肺炎", REPAIRED, ["肺炎"], []),
    ("诊断：肺炎\n鉴别诊断：哮喘\n依据：发热", REPAIRED, ["肺炎"], ["发热"]),
    ('{"诊断": ["肺炎"], "reason": ["发热"]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": ["Asthma"], "诊断依据": ["wheeze"]}', CLEAN, ["Asthma"], ["wheeze"]),
    ('{"诊断结果": {"疾病": "肺炎", "依据": "发热"}}', CLEAN, ["肺炎"], ["发热"]),
    ('{"data": {"diseases": ["肺炎"]}, "code": 0}', CLEAN, ["肺炎"], []),
    ('{"diseases": "肺炎|哮喘", "reason": "发热|气喘"}', CLEAN, ["肺炎", "哮喘"], ["发热", "气喘"]),
    ('{"diseases": ["肺炎", null, ""]}', CLEAN, ["肺炎"], []),
    ('{"diseases": [["肺炎"], ["哮喘"]]}', CLEAN, ["肺炎", "哮喘"], []),
    ('{"diseases": [{"疾病名称": "肺炎", "概率": 0.8, "依据": ["发热"]}]}', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": {"1": "肺炎", "2": "哮喘"}}', CLEAN, ["肺炎", "哮喘"], []),
    ('{"diseases": {"primary": "肺炎", "secondary": ["哮喘"]}}', CLEAN, ["肺炎", "哮喘"], []),
    ('{"主要诊断": "肺炎", "次要诊断": ["哮喘"], "依据": "发热"}', CLEAN, ["肺炎", "哮喘"], ["发热"]),
    ('{"disease1": "肺炎", "disease2": "哮喘"}', CLEAN, ["肺炎", "哮喘"], []),
    ('{"primary_diagnosis": "Asthma", "secondary_diagnoses": ["GERD"]}', CLEAN, ["Asthma", "GERD"], []),
    (
        '{"diagnosis": {"name": "Asthma", "icd10": "J45"}, "evidence": [{"quote": "wheeze"}]}',
        CLEAN,
        ["Asthma"],
        ["wheeze"],
    ),
    ('{"diagnoses": [{"disease": "Asthma", "evidence": "wheeze", "confidence": 0.9}]}', CLEAN, ["Asthma"], ["wheeze"]),
    ('{"differential_diagnosis": ["COPD"], "diagnosis": "Asthma"}', CLEAN, ["Asthma"], []),
    ('{"answer": "肺炎"}', REPAIRED, ["肺炎"], []),
    ('{"answer": ["肺炎"]}', REPAIRED, ["肺炎"], []),
    ('{"prediction": "肺炎"}', REPAIRED, ["肺炎"], []),
    ('{"output": "{\\"diseases\\": [\\"肺炎\\"]}"}', CLEAN, ["肺炎"], []),
    ('{"thought": "x", "diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('{\\"diseases\\": [\\"肺炎\\"], \\"reason\\": [\\"发热\\"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{{"diseases": ["肺炎"]}}', CLEAN, ["肺炎"], []),
    ('{"diseases"：["肺炎"]，"reason"：["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"、"哮喘"]}', REPAIRED, ["肺炎", "哮喘"], []),
    ("{‘diseases’: [‘肺炎’]}", REPAIRED, ["肺炎"], []),
    ('{"diseases": ["肺炎"], "reason": ["发热"]},', CLEAN, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"]; "reason": ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": [肺炎, 哮喘], "reason": [发热]}', REPAIRED, ["肺炎", "哮喘"], ["发热"]),
    ('{"diseases": 肺炎, "reason": 发热}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": ["体温38.5℃",]}', REPAIRED, ["肺炎"], ["体温38.5℃"]),
    ('{"diseases": ["肺炎"], "reason": ["发热", ...]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"], "reason": ["发热"}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎", "reason": ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('{"diseases": ["肺炎"]\n"reason": ["发热"]}', REPAIRED, ["肺炎"], ["发热"]),
    ('JSON: {"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('json\n{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('{"diseases": None, "reason": []}', REPAIRED, [], []),
    ('{"diseases": []}\n说明：信息不足', CLEAN, [], []),
    ("无", REPAIRED, [], []),
    ("N/A", REPAIRED, [], []),
    ("Unknown", REPAIRED, [], []),
    ("无法判断", REPAIRED, [], []),
    ("信息不足，无法诊断", REPAIRED, [], []),
    ("No diagnosis", REPAIRED, [], []),
    ("none", REPAIRED, [], []),
    ("诊断：无", REPAIRED, [], []),
    ("诊断：无法明确", REPAIRED, [], []),
    ("抱歉，诊断：肺炎", REPAIRED, ["肺炎"], []),
    ('Sorry for the delay. {"diseases": ["Asthma"]}', CLEAN, ["Asthma"], []),
    ("<think>x</think>诊断：肺炎", REPAIRED, ["肺炎"], []),
    ("<think>x</think>\n\n肺炎", REPAIRED, ["肺炎"], []),
    ('<think>\n\n</think>\n\n{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('<|begin_of_thought|>x<|end_of_thought|>{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('◁think▷x◁/think▷{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ('<reasoning>可能哮喘</reasoning>{"diseases": ["肺炎"]}', CLEAN, ["肺炎"], []),
    ("思考：先看发热。\n最终诊断：肺炎", REPAIRED, ["肺炎"], []),
    ("<analysis>x</analysis>肺炎", REPAIRED, ["肺炎"], []),
    (
        '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{"diseases": ["肺炎"]}',
        CLEAN,
        ["肺炎"],
        [],
    ),
    ("<disease>肺炎", REPAIRED, ["肺炎"], []),
    ("诊断：肺炎\n依据：发热，咳", REPAIRED, ["肺炎"], ["发热，咳"]),
]


def test_the_shapes_are_many_and_differ() -> None:
    assert len({text for text, *_ in SHAPES}) == len(SHAPES) > 200


@pytest.mark.parametrize(("text", "outcome", "diseases", "reason"), SHAPES)
def test_parse_reads(text: str, outcome: Outcome, diseases: list[str], reason: list[str]) -> None:
    """Each shape gives these names and reasons."""
    parsed = parse(text)
    assert (parsed.outcome, parsed.output) == (
        outcome,
        Diagnosis(diseases=tuple(diseases), reason=tuple(reason)),
    )


@pytest.mark.parametrize(
    ("text", "finish", "outcome"),
    [
        ("", "stop", Outcome.EMPTY),
        (" \n", "stop", Outcome.EMPTY),
        ("<think>x</think>", "stop", Outcome.EMPTY),
        ("", "length", Outcome.TRUNCATED),
        ("<think>让我想想", "stop", Outcome.TRUNCATED),
        ("<think>让我想想", "length", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎", "糖', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎", "', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎",', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎"], "reason":', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎"], "reason": ["发热"]', "length", Outcome.TRUNCATED),
        ("肺炎，哮", "length", Outcome.TRUNCATED),
        ("I'm sorry, I can't help with that.", "stop", Outcome.REFUSED),
        ("抱歉，我无法提供诊断。", "stop", Outcome.REFUSED),
        ('{"diseases": ["肺炎"]}', "refusal", Outcome.REFUSED),
        ("I think it is pneumonia", "stop", Outcome.UNPARSED),
        ("患者需要进一步检查", "stop", Outcome.UNPARSED),
        ('{"name": "张三"}', "stop", Outcome.UNPARSED),
        ('{"diseases": ["…"], "reason": ["…"]}', "stop", Outcome.UNPARSED),
        ('{"diseases": 3}', "stop", Outcome.UNPARSED),
        ('{"reason": ["发热"]}', "stop", Outcome.UNPARSED),
        ("42", "stop", Outcome.UNPARSED),
        ('{"diseases": true}', "stop", Outcome.UNPARSED),
        ('{"diseases": ["肺炎], "reason": ["发热"]}', "stop", Outcome.UNPARSED),
        ('{"diseases" ["肺炎"]}', "stop", Outcome.UNPARSED),
        ("对不起，我不能回答。", "stop", Outcome.REFUSED),
        ("As an AI language model, I cannot diagnose.", "stop", Outcome.REFUSED),
        ("I cannot provide a medical diagnosis.", "stop", Outcome.REFUSED),
        ("很抱歉，根据现有信息无法诊断。", "stop", Outcome.REFUSED),
        ("I'm not able to provide a diagnosis.", "stop", Outcome.REFUSED),
        ("I am not a doctor, please consult one.", "stop", Outcome.REFUSED),
        ("Unfortunately, I can't help.", "stop", Outcome.REFUSED),
        ("作为AI助手，我不能提供医疗诊断", "stop", Outcome.REFUSED),
        ('<think>x{"diseases": ["肺炎"]}', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎"], "reason": ["发热", "咳', "stop", Outcome.TRUNCATED),
        ('{"diseases": ["肺炎"], "rea', "stop", Outcome.TRUNCATED),
        ('{"diseases"', "stop", Outcome.TRUNCATED),
        ("{", "stop", Outcome.TRUNCATED),
        ('```json\n{"diseases": ["肺炎"', "stop", Outcome.TRUNCATED),
        ('["肺炎", "哮', "stop", Outcome.TRUNCATED),
        ("{'diseases': ['肺炎', '哮", "stop", Outcome.TRUNCATED),
        ("病人需要进一步检查才能明确诊断。", "stop", Outcome.UNPARSED),
        ("...", "stop", Outcome.UNPARSED),
        ("？", "stop", Outcome.UNPARSED),
        ("好的", "stop", Outcome.UNPARSED),
        ("OK", "stop", Outcome.UNPARSED),
        ("Yes", "stop", Outcome.UNPARSED),
        ("yes", "stop", Outcome.UNPARSED),
        ("```json\n```", "stop", Outcome.EMPTY),
        ("```\n\n```", "stop", Outcome.EMPTY),
        ("true", "stop", Outcome.UNPARSED),
        ('""', "stop", Outcome.EMPTY),
        ('{"error": "timeout"}', "stop", Outcome.UNPARSED),
        ("<html><body>502</body></html>", "stop", Outcome.UNPARSED),
        ("Error: rate limit exceeded", "stop", Outcome.UNPARSED),
        ("性别: 男\n年龄: 30\n主诉: 发热", "stop", Outcome.UNPARSED),
    ],
)
def test_parse_says_why_not(text: str, finish: str, outcome: Outcome) -> None:
    """A reply that gives no answer has an outcome that is also the name of a failure."""
    parsed = parse(text, finish)
    assert parsed.outcome is outcome
    assert parsed.output is None
    assert FailureKind(outcome)
    assert parsed.detail


def test_a_whole_answer_survives_a_cut_after_it() -> None:
    """Prose that was cut off behind complete JSON costs nothing."""
    assert parse('{"diseases": ["肺炎"]} 以上是', "length").outcome is CLEAN


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "[",
        '{"a":',
        '{"diseases":["',
        "<think>",
        "<disease>",
        "```",
        '\\"',
        "(",
        "?",
        "\n",
        "<answer>",
        "\\boxed{",
        "诊断：",
        "\na. ",
        "|---|\n",
        "\n1 ",
        "[诊断",
        "## ",
    ],
)
def test_parse_survives_floods(unit: str) -> None:
    """A hundred thousand characters of anything cost a fraction of a second; were it quadratic, a minute."""
    for before in ("", "{'diseases': ['肺炎', "):
        began = time.process_time()
        parse(before + unit * (100_000 // len(unit)))
        assert time.process_time() - began < 5


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}[]\"'\\:, \n<>/diseasesrn诊断肺炎1.；、think\ud800", max_size=80))
def test_parse_never_fails(text: str) -> None:
    """Any text has an outcome, and what comes out can be written."""
    parsed = parse(text)
    assert (parsed.output is None) == (parsed.outcome not in (CLEAN, REPAIRED))
    parsed.model_dump_json()


@pytest.mark.parametrize(
    "text",
    ["I think of the flu.\n[act: consult]\nbye", "[act: consult]", "好的\n[注意: 需复查]", "As told [see above] it is"],
)
def test_brackets_in_prose_name_nothing(text: str) -> None:
    output = parse(text).output
    assert output is None or not any(name in text[text.find("[") :] for name in output.diseases)
