import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from preceptor.core.records import Case, Consultation, Diagnosis, Failure, FailureKind, Message, Prediction
from preceptor.tasks import diagnosis
from preceptor.tasks.curation import Dropped, Graded, Rules, choose, graded, paired, written

EN = "Cough for three days. Temperature 38.6 C. No chest pain. Green sputum since Monday."
ZH = "患者咳嗽、咳黄痰3天，体温38.6℃，无胸痛，既往有高血压病史。"
COUGH, HEAT, SPUTUM, LIE = "Cough for three days", "Temperature 38.6 C", "Green sputum", "blood in the urine"
CONSULT = "我胸痛半小时，出冷汗，左臂发麻，怎么办？"
ADVICE = "这些表现要警惕心梗，请立即拨打120去急诊，途中不要走动。"
THINK = "患者胸痛半小时，出冷汗，左臂发麻，需要先排除急性心肌梗死，属于急症。"


def case(text=EN, **fields):
    return Case(id="c", text=text, language="zh" if text != EN else "en", source="s", group="g", **fields)


def label(diseases=("pneumonia",), reason=(COUGH,), sample=0, **fields):
    output = fields.pop("output", None) or Diagnosis(diseases=diseases, reason=reason)
    return Prediction(case_id="c", sample=sample, model="teacher", prompt_sha="", output=output, **fields)


def judged(one, about=None, reviewed=False, **rules):
    return graded(one, about or case(), Rules(**rules), reviewed=reviewed)


@pytest.mark.parametrize(
    ("one", "rules", "fault", "reasons"),
    [
        (label(), {}, None, (COUGH,)),
        (label(reason=(COUGH, LIE)), {}, None, (COUGH,)),
        (label(reason=(COUGH, LIE, "fever of 40.1 C")), {}, "ungrounded", (COUGH,)),
        (label(reason=(COUGH, LIE, "fever of 40.1 C")), {"grounded": 0.3}, None, (COUGH,)),
        (label(reason=("chest pain",)), {}, "ungrounded", ()),
        (label(reason=()), {"grounded": 0}, "ungrounded", ()),
        (label(reason=(COUGH, LIE)), {"hallucinated": 0.4}, "hallucinated", (COUGH,)),
        (label(reason=(COUGH, LIE)), {"hallucinated": 0.5}, None, (COUGH,)),
        (label(reason=(COUGH, LIE)), {"score": 0.6}, "low_score", (COUGH,)),
        (label(reason=(COUGH, LIE)), {"score": 0.5}, None, (COUGH,)),
        (label(("Zebra fever",)), {}, None, (COUGH,)),
        (label(("Zebra fever",)), {"known": True}, "unmapped", (COUGH,)),
        (label(), {"think": True}, "unthought", (COUGH,)),
        (label(thinking="It coughs."), {"think": True}, None, (COUGH,)),
        (label((), ()), {"score": 0.9, "known": True}, None, ()),
        (label(repaired=True), {}, None, (COUGH,)),
        (label(repaired=True), {"repaired": "drop"}, "repaired", (COUGH,)),
        (label(corrected=True), {"corrected": "drop"}, "corrected", (COUGH,)),
        (label(revised=True), {"revised": "drop"}, "revised", (COUGH,)),
    ],
)
def test_what_is_learned_of_a_diagnosis(one, rules, fault, reasons):
    found = judged(one, **rules)
    assert (found.fault and found.fault[0], found.answer.reason, found.doubts) == (fault, reasons, ())
    assert found.trimmed == (reasons != one.output.reason)


SURE = {"pneumonia": 0.834, "cold": 0.1}


@pytest.mark.parametrize(
    ("one", "fault", "said"),
    [
        (
            label(confidence=SURE),
            None,
            '{"diseases": ["pneumonia"], "confidence": [0.83], "reason": ["' + COUGH + '"]}',
        ),
        (label((), ()), None, '{"diseases": [], "confidence": [], "reason": []}'),
        (label(reason=(COUGH, LIE), confidence={"pneumonia": 0.5}), None, None),
        (label(), "unstated", None),
        (label(("pneumonia", "gout"), confidence=SURE), "unstated", None),
        (label(reason=(LIE,)), "unstated", None),
    ],
)
def test_how_sure_the_teacher_is_can_be_learned(one, fault, said):
    rules = Rules(states=True)
    found = judged(one, states=True)
    assert (found.fault and found.fault[0]) == fault
    if said:
        assert written(found.label, found.answer, rules) == said
        assert "confidence" not in written(found.label, found.answer, Rules())
    if fault:
        lacking = one.output.diseases[-1]
        assert found.fault[1].startswith(f"how sure the teacher is of {lacking} is not known; label with logprobs: 5")
        assert judged(one, reviewed=True, states=True).fault[0] == fault, "no person can tell"
        assert (judged(one).fault or [""])[0] != fault


def test_thinking_stands_before_what_is_stated():
    found = judged(label(thinking="It coughs.", confidence=SURE), states=True, think=True)
    rules = Rules(states=True, think=True)
    assert written(found.label, found.answer, rules) == (
        '<think>\nIt coughs.\n</think>\n\n{"diseases": ["pneumonia"], "confidence": [0.83], "reason": ["'
        + COUGH
        + '"]}'
    )


def test_a_pair_needs_both_numbers():
    gold = case(gold=Diagnosis(diseases=("pneumonia",), reason=(COUGH,)))
    better = label(confidence=SURE)
    sure, unsure = (label(("cold",), sample=n + 1, confidence=c) for n, c in enumerate((SURE, {})))
    rules = Rules(states=True, pairs=9)
    (pair,) = paired([graded(one, gold, rules) for one in (better, sure, unsure)], gold, (), rules)
    assert pair.id == "c#0>1"
    assert '"confidence": [0.10]' in pair.rejected
    assert (
        len(paired([graded(one, gold, Rules(pairs=9)) for one in (better, sure, unsure)], gold, (), Rules(pairs=9)))
        == 2
    )


def test_numbers_of_the_same_answer_make_no_other_answer():
    rules = Rules(states=True, samples="all")
    twice = [
        judged(label(sample=n, confidence={"pneumonia": share}), states=True) for n, share in enumerate((0.5, 0.9))
    ]
    choice = choose(twice, rules)
    assert (len(choice.learned), [one.reason for one in choice.dropped]) == (1, ["repeated"])


@pytest.mark.parametrize("more", [{"part": "diseases"}, {"task": "consult"}])
def test_only_a_whole_diagnosis_states_numbers(more):
    with pytest.raises(ValidationError, match="states: only a whole diagnosis states its confidence"):
        Rules(states=True, **more)


def test_gold_does_not_make_a_reason_stand():
    about = case(gold=Diagnosis(diseases=("pneumonia",), reason=(LIE,)))
    assert judged(label(reason=(LIE,)), about).fault[0] == "ungrounded"


@pytest.mark.parametrize(
    ("one", "rules", "doubts"),
    [
        (label(agreement=0.4), {"agreement": 0.6}, ("agreement 0.40",)),
        (label(agreement=0.6), {"agreement": 0.6}, ()),
        (label(), {"agreement": 0.6}, ("agreement unknown",)),
        (label(), {}, ()),
        (label(reason=(COUGH, LIE)), {"review_score": 0.8}, ("score 0.50",)),
        (label(repaired=True, revised=True), {"repaired": "review", "revised": "review"}, ("repaired", "revised")),
    ],
)
def test_what_a_person_should_look_at(one, rules, doubts):
    found = judged(one, **rules)
    assert (found.doubts, found.passes) == (doubts, not doubts)
    assert judged(one, reviewed=True, **rules).passes, "and has looked at"


@pytest.mark.parametrize(
    ("advice", "rules", "fault"),
    [
        (Consultation(think=THINK, answer=ADVICE), {}, None),
        (Consultation(answer=ADVICE), {}, "unthought"),
        (Consultation(answer=ADVICE), {"think": False}, None),
        (Consultation(think=THINK, answer="这不是急诊情况，不用打120，在家休息。"), {}, "severe_miss"),
        (Consultation(think=THINK, answer=ADVICE + "每天三次，每次口服阿莫西林0.5g。"), {}, "risky_prescription"),
        (Consultation(think=THINK + "<think>", answer=ADVICE), {"think": False}, "stray_tags"),
        (Consultation(think="嗯。", answer=ADVICE), {"score": 0.8}, "low_score"),
    ],
)
def test_what_is_learned_of_advice(advice, rules, fault):
    about = case(CONSULT, meta={"risk_level": "critical"})
    found = judged(label(output=advice), about, task="consult", **rules)
    assert (found.fault and found.fault[0]) == fault
    hard = fault in ("unthought", "severe_miss", "risky_prescription", "stray_tags")
    by_person = judged(label(output=advice), about, reviewed=True, task="consult", **rules)
    assert by_person.passes != hard, "no person lifts what makes advice unsafe"
    if not fault:
        answer = written(found.label, found.answer, Rules(task="consult", **rules))
        assert answer == (ADVICE if rules else f"<think>{THINK}</think>\n{ADVICE}")


def test_a_failure_is_no_label_and_neither_is_the_other_task():
    failed = Prediction(
        case_id="c", sample=3, model="t", prompt_sha="", failure=Failure(kind=FailureKind.TRUNCATED, detail="cut")
    )
    for reviewed in (False, True):
        assert judged(failed, reviewed=reviewed) == Dropped(case_id="c", sample=3, reason="truncated", detail="cut")
    assert judged(label(), task="consult").reason == "other_task"
    assert judged(label(output=Consultation(answer="Rest."))).reason == "other_task"


def several(*labels, about=None, **rules):
    return [judged(one, about, **rules) for one in labels]


def samples(chosen):
    return [one.label.sample for one in chosen]


GOOD = label(reason=(COUGH, HEAT), sample=1)
FAIR = label(reason=(COUGH, LIE), sample=0)
SILENT = label((), (), sample=2)


@pytest.mark.parametrize(
    ("labels", "rules", "learned", "review", "dropped"),
    [
        ((FAIR, GOOD), {}, [1], [], {0: "outdone"}),
        ((GOOD, GOOD.model_copy(update={"sample": 0})), {}, [0], [], {1: "repeated"}),
        (
            (GOOD, GOOD.model_copy(update={"sample": 0, "agreement": 0.2}), label(sample=5, agreement=0.9)),
            {},
            [5],
            [],
            {0: "outdone", 1: "outdone"},
        ),
        ((FAIR, GOOD), {"samples": "all"}, [1, 0], [], {}),
        ((GOOD, GOOD.model_copy(update={"sample": 4})), {"samples": "all"}, [1], [], {4: "repeated"}),
        # An abstention has no score without gold: the many go first.
        ((GOOD, SILENT), {}, [1], [], {2: "outdone"}),
        ((GOOD, SILENT, SILENT.model_copy(update={"sample": 3})), {}, [2], [], {1: "outdone", 3: "repeated"}),
        # Who is in doubt gives way to who is not, and goes to review alone where all are.
        (
            (GOOD, FAIR.model_copy(update={"agreement": 0.9})),
            {"agreement": 0.5},
            [0],
            [],
            {1: "outdone"},
        ),
        ((FAIR, GOOD), {"agreement": 0.5}, [], [1], {0: "outdone"}),
        ((FAIR, GOOD), {"agreement": 0.5, "samples": "all"}, [], [1, 0], {}),
        ((label(reason=(LIE,)),), {}, [], [], {0: "ungrounded"}),
    ],
)
def test_which_of_several_is_learned(labels, rules, learned, review, dropped):
    choice = choose(several(*labels, **rules), Rules(**rules))
    assert (samples(choice.learned), samples(choice.review)) == (learned, review)
    assert {one.sample: one.reason for one in choice.dropped} == dropped


def test_gold_decides_where_it_is_known_and_ties_go_to_the_later_file():
    about = case(gold=Diagnosis(diseases=("asthma",), reason=(COUGH,)))
    wrong, right = label(reason=(COUGH, HEAT), sample=0), label(("asthma",), (COUGH, LIE), sample=1)
    assert samples(choose(several(wrong, right, about=about), Rules()).learned) == [1]
    assert samples(choose(several(wrong, right), Rules()).learned) == [0]
    one = judged(label(sample=0, agreement=1.0))
    later = Graded(label(sample=1), one.answer, one.value, None, (), source=1)
    assert samples(choose([one, later], Rules()).learned) == [1]


def test_a_persons_word_comes_first():
    said = judged(FAIR, reviewed=True)
    best = judged(GOOD)
    assert samples(choose([said, best], Rules()).learned) == [0]
    assert samples(choose([said, best], Rules(samples="all")).learned) == [1, 0]


MESSAGES = (Message(role="user", content="?"),)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [(1, 3, 1.0, 0.0)]),
        ({"pairs": 9}, [(1, 3, 1.0, 0.0), (0, 3, 1.0, 0.0), (1, 0, 1.0, 0.5)]),
        ({"pairs": 9, "margin": 0.6}, [(1, 3, 1.0, 0.0)]),
        ({"pairs": 0}, []),
        ({"score": 0.6, "pairs": 9}, [(1, 3, 1.0, 0.0), (1, 0, 1.0, 0.5)]),
    ],
)
def test_pairs_are_the_most_different_answers(rules, expected):
    answers = several(FAIR, GOOD, SILENT, label(reason=(LIE,), sample=3), **rules)
    found = paired(answers, case(), MESSAGES, Rules(**rules))
    assert [pair.id for pair in found] == [f"c#{better}>{worse}" for better, worse, _, _ in expected]
    assert [(pair.chosen_score, pair.rejected_score) for pair in found] == [end[2:] for end in expected]
    for pair in found:
        chosen, rejected = (diagnosis.parse(text).output for text in (pair.chosen, pair.rejected))
        assert LIE not in chosen.reason, "what stands nowhere is taken out of the better one alone"
        assert diagnosis.grade(rejected, case()).value == pair.rejected_score
        assert diagnosis.grade(chosen, case()).value == pair.chosen_score
        assert pair.messages == MESSAGES


def test_pairs_of_advice_and_of_thinking():
    about = case(CONSULT, meta={"risk_level": "critical"})
    labels = [
        label(output=Consultation(think=THINK, answer="不用打120，在家休息。"), sample=0),
        label(output=Consultation(think=THINK, answer=ADVICE), sample=1),
        label(output=Consultation(answer="在家休息。"), sample=2),
    ]
    (pair,) = paired(several(*labels, about=about, task="consult"), about, MESSAGES, Rules(task="consult", pairs=5))
    assert (pair.id, pair.chosen) == ("c#1>0", f"<think>{THINK}</think>\n{ADVICE}")
    assert (pair.chosen_score, pair.rejected_score) == (1.0, 0.0)
    thought = [one.model_copy(update={"thinking": "T"}) for one in (GOOD, FAIR)]
    (pair,) = paired(several(*thought, think=True), case(), MESSAGES, Rules(think=True))
    assert pair.rejected == f"<think>\nT\n</think>\n\n{diagnosis.canonical(FAIR.output)}"


reasons = st.lists(st.sampled_from([COUGH, HEAT, SPUTUM, LIE, "chest pain", "No chest pain"]), max_size=4, unique=True)
made = st.builds(
    lambda names, why, agreement, flag: (tuple(names), tuple(why), agreement, flag),
    st.lists(st.sampled_from(["pneumonia", "asthma"]), max_size=2, unique=True),
    reasons,
    st.none() | st.floats(0, 1),
    st.booleans(),
)
ruled = st.builds(
    Rules,
    samples=st.sampled_from(["best", "all"]),
    agreement=st.sampled_from([0.0, 0.5]),
    repaired=st.sampled_from(["keep", "review", "drop"]),
    pairs=st.integers(0, 4),
)


@given(st.lists(made, max_size=6), ruled, st.booleans())
def test_every_label_ends_in_one_place(drawn, rules, known):
    about = case(gold=Diagnosis(diseases=("asthma",), reason=(COUGH,)) if known else None)
    labels = [
        label(names, why, sample, agreement=agreement, repaired=flag)
        for sample, (names, why, agreement, flag) in enumerate(drawn)
    ]
    answers = [graded(one, about, rules) for one in labels]
    choice = choose(answers, rules)
    ends = [*samples(choice.learned), *samples(choice.review), *(one.sample for one in choice.dropped)]
    assert sorted(ends) == list(range(len(labels)))
    assert not (choice.learned and choice.review)
    assert rules.samples == "all" or len(choice.learned) + len(choice.review) <= 1
    for one in choice.learned:
        assert one.passes
        assert one.answer.abstained or diagnosis.grade(one.answer, case()).parts["hallucinated"] == 0
    pairs = paired(answers, about, MESSAGES, rules)
    assert len(pairs) <= rules.pairs
    assert all(pair.chosen_score - pair.rejected_score >= rules.margin - 1e-9 for pair in pairs)
