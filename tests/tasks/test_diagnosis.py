"""What is written is read back; grades order answers as a clinician would."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.clinical.names import Entry, Namer
from preceptor.clinical.textbook.book import load
from preceptor.core.records import Case, Diagnosis, Polarity, Reply, Token
from preceptor.tasks.diagnosis import Outcome, canonical, chain_probability, fields, grade, ground, parse

names = st.lists(st.sampled_from(sorted(d.zh for d in load().diseases.values())), max_size=4, unique=True)
reasons = st.lists(
    st.text(alphabet="发热咳嗽3天，\"'{}\\", min_size=1, max_size=12).map(lambda r: "痛" + r + "痛"),
    max_size=3,
)


def test_what_is_stated_stands_between_the_lists_and_weighs_as_the_diseases() -> None:
    answer = canonical(Diagnosis(diseases=("Gout", "Flu"), reason=("toe",)), {"Flu": 0.1049, "Gout": 0.831, "Croup": 1})
    assert answer == '{"diseases": ["Gout", "Flu"], "confidence": [0.83, 0.10], "reason": ["toe"]}'
    assert [(name, answer[start:end]) for name, start, end in fields(answer)] == [
        ("diseases", '["Gout", "Flu"]'),
        ("diseases", "[0.83, 0.10]"),
        ("evidence", '["toe"]'),
    ]
    assert canonical(Diagnosis(), {}) == '{"diseases": [], "confidence": [], "reason": []}'


@given(names, reasons)
def test_canonical_reads_back(diseases: list[str], reason: list[str]) -> None:
    """What we write, we read: cleanly and unchanged."""
    diagnosis = Diagnosis(diseases=tuple(diseases), reason=tuple(reason))
    parsed = parse(canonical(diagnosis))
    assert (parsed.outcome, parsed.output) == (Outcome.CLEAN, diagnosis)


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
    parts = grade(GOLD, case()).parts
    assert (parts.pop("unmapped"), parts.pop("hallucinated"), set(parts.values())) == (0.0, 0.0, {1.0})
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
        "hallucinated": 0.5,
        "supported": 1.0,
        "unmapped": 0.0,
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


@pytest.mark.parametrize(
    ("diseases", "unmapped", "with_table"),
    [
        (["急性阑尾炎"], 0, 0),
        (["阑尾穿孔", "哮喘"], 0.5, 0),
        (["阑尾穿孔", "骨折", "肺炎"], 2 / 3, 1 / 3),
        ([], None, None),
    ],
)
def test_names_that_lead_nowhere_are_counted_by_the_namer_in_use(
    diseases: list[str], unmapped: float | None, with_table: float | None
) -> None:
    """A share of the names in the answer; a user's table may know more of them, and then they count."""
    output = Diagnosis(diseases=tuple(diseases))
    namer = Namer(load(), [Entry("急性阑尾炎", "", ("阑尾穿孔",))])
    parts, known = grade(output, case()).parts, grade(output, case(), namer).parts
    assert (parts["unmapped"], known["unmapped"]) == (unmapped, with_table)
    assert (known["top1"] == 1) == ("阑尾穿孔" in diseases or diseases == ["急性阑尾炎"])
    assert grade(None, case()).parts["unmapped"] is None


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


def test_a_name_is_closed_by_any_token_that_begins_with_the_quote() -> None:
    """Whether the list ends there too is another question; what goes on with the name is another name."""
    last = Token(
        utf8=b'a"], "',
        logprob=math.log(0.4),
        alternatives=((b'a"], "', math.log(0.4)), (b'a", "', math.log(0.3)), (b"al", math.log(0.2)), (b'a"', -3.0)),
    )
    head = Token(utf8=b'{"diseases": ["Influenz', logprob=math.log(0.5))
    reply = Reply(text='{"diseases": ["Influenza"], "', tokens=(head, last))
    found = chain_probability(reply, Diagnosis(diseases=("Influenza",)))
    assert found == pytest.approx({"Influenza": 0.5 * (0.4 + 0.3 + math.exp(-3.0))})
    plain = Token(utf8=b"a", logprob=math.log(0.6), alternatives=((b"a", math.log(0.6)), (b"al", math.log(0.3))))
    bare = Reply(text="Influenza", tokens=(head.model_copy(update={"utf8": b"Influenz"}), plain))
    assert chain_probability(bare, Diagnosis(diseases=("Influenza",))) == pytest.approx({"Influenza": 0.5 * 0.6})


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


@pytest.mark.parametrize(
    ("diseases", "reason", "expected"),
    [
        (["急性阑尾炎"], ["转移性右下腹痛"], 1.0),
        (["支气管哮喘"], ["转移性右下腹痛"], 0.0),
        (["支气管哮喘", "急性阑尾炎"], ["转移性右下腹痛"], 1.0),
        (["支气管哮喘"], ["喘息", "黑便"], 0.5),
        (["支气管哮喘"], ["喘息", "否认黑便"], 1.0),
        (["支气管哮喘"], ["看上去就是这样"], None),
        (["从未听说的病"], ["喘息"], None),
        ([], [], None),
    ],
)
def test_support_is_what_the_textbook_says(diseases: list[str], reason: list[str], expected: float | None) -> None:
    given = Diagnosis(diseases=tuple(diseases), reason=tuple(reason))
    assert grade(given, case()).parts["supported"] == expected
