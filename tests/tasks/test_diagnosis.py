"""Replies as models and people write them are read; grades order answers as a clinician would."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.clinical.textbook.book import load
from preceptor.core.records import Case, Diagnosis, FailureKind, Polarity, Reply, Token
from preceptor.tasks.diagnosis import Outcome, canonical, chain_probability, grade, ground, parse

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
]


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
    "unit", ["{", "[", '{"a":', '{"diseases":["', "<think>", "<disease>", "```", '\\"', "(", "?", "\n"]
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


names = st.lists(st.sampled_from(sorted(d.zh for d in load().diseases.values())), max_size=4, unique=True)
reasons = st.lists(
    st.text(alphabet="发热咳嗽3天，\"'{}\\", min_size=1, max_size=12).map(lambda r: "痛" + r + "痛"),
    max_size=3,
)


@given(names, reasons)
def test_canonical_reads_back(diseases: list[str], reason: list[str]) -> None:
    """What we write, we read: cleanly and unchanged."""
    diagnosis = Diagnosis(diseases=tuple(diseases), reason=tuple(reason))
    parsed = parse(canonical(diagnosis))
    assert (parsed.outcome, parsed.output) == (CLEAN, diagnosis)


TEXT = "主诉: 转移性右下腹痛1天。现病史: 右下腹压痛，体温38.6℃，无腹泻，否认血尿。既往史: 体健，否认高血压、糖尿病史。"
GOLD = Diagnosis(diseases=("急性阑尾炎", "缺铁性贫血"), reason=("转移性右下腹痛1天", "无腹泻"))


def case(gold: Diagnosis | None = GOLD, *, expects_abstention: bool = False) -> Case:
    """A case with this gold."""
    return Case(
        id="1",
        text=TEXT,
        language="zh",
        source="test",
        group="1",
        gold=gold,
        expects_abstention=expects_abstention,
    )


def value(diseases: list[str], reason: list[str], of: Case | None = None) -> float:
    """The grade of an answer."""
    score = grade(Diagnosis(diseases=tuple(diseases), reason=tuple(reason)), of or case())
    assert score.value is not None
    return score.value


def test_gold_scores_one() -> None:
    """Gold is right in all its parts, also in other words, with no reasons, or as an abstention."""
    assert set(grade(GOLD, case()).parts.values()) == {1.0}
    assert value(["阑尾炎", "Iron-deficiency anemia"], ["转移性右下腹痛1天"]) == 1
    bare = Diagnosis(diseases=("急性阑尾炎",))
    assert grade(bare, case(bare)).value == 1
    paraphrased = Diagnosis(diseases=("急性阑尾炎",), reason=("典型病史",))
    assert grade(paraphrased, case(paraphrased)).value == 1
    assert grade(Diagnosis(), case(Diagnosis())).value == 1


def test_parts_of_a_half_right_answer() -> None:
    """One of two diseases, behind a wrong one, and one of two reasons."""
    score = grade(Diagnosis(diseases=("哮喘", "阑尾炎"), reason=("右下腹压痛", "体温39.6℃")), case())
    assert score.parts == {
        "parsed": 1.0,
        "top1": 0.0,
        "precision": 0.5,
        "recall": 0.5,
        "disease_f1": 0.5,
        "category_f1": 0.5,
        "exact_set": 0.0,
        "evidence_grounded": 0.5,
    }
    assert score.value == pytest.approx((0 + 0.5 + 0.5 * 0.5) / 3)


@pytest.mark.parametrize(
    ("reason", "held"),
    [
        ("右下腹压痛", 1),
        ("无腹泻", 1),
        ("腹泻", 0),
        ("否认血尿", 1),
        ("血尿", 0),
        ("糖尿病", 0),
        ("体温38.6℃", 1),
        ("体温36.8℃", 0),
        ("左下腹压痛", 0),
        ("白细胞升高", 0),
    ],
)
def test_evidence_must_be_said_and_said_so(reason: str, held: int) -> None:
    """A denied finding is no evidence of it; the denial itself may be quoted."""
    assert grade(Diagnosis(diseases=("急性阑尾炎",), reason=(reason,)), case()).parts["evidence_grounded"] == held


def test_abstention() -> None:
    """Right where the record says too little; elsewhere nothing, like a wrong answer with true quotes."""
    unsure = case(expects_abstention=True)
    assert value([], [], unsure) == 1
    assert value(["急性阑尾炎", "缺铁性贫血"], ["右下腹压痛"], unsure) == 1
    assert value([], []) == 0
    assert value(["哮喘"], ["右下腹压痛"]) == 0


def test_unread_and_ungraded() -> None:
    """A reply that couldn't be read scores 0; without gold its parts are unknown, not 0."""
    failed = grade(None, case())
    assert (failed.value, failed.parts["parsed"], failed.parts["top1"]) == (0, 0, 0)
    blind = grade(GOLD, case(None))
    assert (blind.value, blind.parts["top1"], blind.parts["evidence_grounded"]) == (1, None, 1)
    assert grade(Diagnosis(), case(None)).value is None


def test_gaming_does_not_pay() -> None:
    """Copying the record, naming everything, repeating or padding scores below a plain answer."""
    plain = value(["急性阑尾炎"], ["转移性右下腹痛1天"])
    everything = ["急性阑尾炎"] + [d.zh for d in load().diseases.values() if d.id != "appendicitis"]
    assert value(everything, ["转移性右下腹痛1天"]) < plain
    assert value(["急性阑尾炎"], [TEXT]) < plain
    assert value(["急性阑尾炎"], TEXT.split("，")) < plain
    assert value(["急性阑尾炎", "阑尾炎", "急性阑尾炎"], ["转移性右下腹痛1天"]) < plain
    assert value(["急性阑尾炎"], []) < plain
    invented = ["转移性右下腹痛1天", "腹膜刺激征阳性"]
    assert value(["急性阑尾炎"], ["转移性右下腹痛1天"] * 9 + invented) == value(["急性阑尾炎"], invented)


@given(st.data())
def test_a_more_wrong_answer_never_scores_higher(data: st.DataObject) -> None:
    """Putting a wrong disease in, or a right one or a true reason out for a wrong one, never helps."""
    known = sorted(d.zh for d in load().diseases.values())
    gold = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    wrong = [name for name in known if name not in gold]
    answer = data.draw(st.lists(st.sampled_from(gold + wrong[:3]), min_size=1, max_size=4, unique=True))
    reason = data.draw(
        st.lists(st.sampled_from(["右下腹压痛", "无腹泻", "体温38.6℃", "头晕"]), min_size=1, unique=True)
    )
    of = case(Diagnosis(diseases=tuple(gold), reason=("右下腹压痛",)))
    before = value(answer, reason, of)
    place = data.draw(st.integers(0, len(answer)))
    intruder = data.draw(st.sampled_from(wrong[3:]))
    assert value([*answer[:place], intruder, *answer[place:]], reason, of) <= before
    assert value([intruder if i == place else name for i, name in enumerate(answer)], reason, of) <= before
    spoilt = data.draw(st.integers(0, len(reason) - 1))
    assert value(answer, ["视物模糊" if i == spoilt else r for i, r in enumerate(reason)], of) <= before


@given(st.permutations(["急性阑尾炎", "哮喘", "缺铁性贫血", "阑尾炎"]))
def test_order_never_matters_for_f1(order: list[str]) -> None:
    """Only the first disease has a part of its own."""
    assert grade(Diagnosis(diseases=tuple(order)), case()).parts["disease_f1"] == pytest.approx(2 / 3)


def test_ground_places_the_reasons() -> None:
    """With the offsets, what the record says there, and the finding where the textbook knows it."""
    grounded = ground(Diagnosis(diseases=("急性阑尾炎",), reason=("右下腹压痛", "腹泻", "皮疹")), case())
    assert [(e.text, TEXT[e.start : e.end], e.polarity) for e in grounded.evidence] == [
        ("右下腹压痛", "右下腹压痛", Polarity.AFFIRMED),
        ("腹泻", "腹泻", Polarity.NEGATED),
    ]
    assert grounded.evidence[1].finding == "diarrhoea"
    assert grounded.reason == ("右下腹压痛", "腹泻", "皮疹")


def test_ground_takes_the_place_that_agrees() -> None:
    """Of several places of a quotation, one with its own polarity."""
    twice = case().model_copy(update={"text": "入院时无发热，3天后发热。"})
    assert ground(Diagnosis(reason=("发热",)), twice).evidence[0].start == 10


def tokens(*pieces: tuple[bytes, float]) -> Reply:
    """A reply of tokens with these probabilities."""
    made = tuple(Token(utf8=piece, logprob=math.log(p)) for piece, p in pieces)
    return Reply(text=b"".join(piece for piece, _ in pieces).decode(), tokens=made)


def test_chain_probability_runs_to_the_closing_quote() -> None:
    """A character over two tokens, quotes merged with names and separators; nothing around it counts."""
    lung = "肺".encode()
    reply = tokens(
        (b'{"diseases": [', 0.1),
        (b'"' + lung[:2], 0.9),
        (lung[2:], 0.8),
        ("炎".encode(), 0.7),
        (b'", "', 0.6),
        ("哮喘".encode(), 0.5),
        (b'"', 0.4),
        (b'], "reason": ["\xe8\x82\xba\xe7\x82\x8e"]}', 0.1),
    )
    found = chain_probability(reply, Diagnosis(diseases=("肺炎", "哮喘", "肺结核")))
    assert found == pytest.approx({"肺炎": 0.9 * 0.8 * 0.7 * 0.6, "哮喘": 0.5 * 0.4})


def test_chain_probability_of_other_forms() -> None:
    """Escaped JSON, the competition's strings, bare names; no tokens, no probability."""
    escaped = tokens((b'{"diseases":["', 0.5), (b"\\u80ba", 0.9), (b"\\u708e", 0.8), (b'"]}', 0.7))
    assert chain_probability(escaped, Diagnosis(diseases=("肺炎",))) == pytest.approx({"肺炎": 0.9 * 0.8 * 0.7})
    listed = tokens((b"1. ", 0.5), ("肺炎".encode(), 0.9), ("；2. ".encode(), 0.5), ("哮喘".encode(), 0.8))
    assert chain_probability(listed, Diagnosis(diseases=("肺炎", "哮喘"))) == pytest.approx({"肺炎": 0.9, "哮喘": 0.8})
    assert chain_probability(Reply(text="肺炎"), Diagnosis(diseases=("肺炎",))) == {}


def test_the_textbook_grades_its_own_gold_as_right() -> None:
    """Sampled cases in both languages and styles."""
    from preceptor.clinical.textbook.sampler import sample

    for language in ("zh", "en"):
        for sampled in sample(60, 3, language):
            assert isinstance(sampled.gold, Diagnosis)
            assert grade(sampled.gold, sampled).value == 1
            assert len(ground(sampled.gold, sampled).evidence) == len(sampled.gold.reason)
