import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis
from preceptor.data.layouts import DDXPLUS, LAYOUTS, detect, digest_id, instruction_importer, language_of
from preceptor.data.rows import BadRow

RECORD = "性别: 男\n年龄: 48\n主诉: 咳嗽3天"
OURS = Case(id="7", text="cough", language="en", source="s", group="g", gold=Diagnosis(diseases=("flu",)))
ROWS = {
    "healthai": {"id": 7, "feature_content": RECORD},
    "healthai_labelled": {
        "id": 7,
        "bingli_json": '{ "诊断": "1. 支气管炎；2. 发热", "诊断依据": "1. 咳嗽3天；\\n2. 无胸痛。" }',
        "diseases": "支气管炎|发热待查",
        "feature_content": RECORD,
    },
    "healthai_submission": {
        "id": 7,
        "reason": "1. 咳嗽3天；\\n2. 38.5℃；无胸痛。",
        "diseases": "1. 支气管炎；2. 高血压（1级）",
        "feature_content": RECORD,
    },
    "instruction": {
        "instruction": "答",
        "input": "咳嗽？",
        "output": "<think>想\n想</think>\n多喝水",
        "meta": {"k": 1},
    },
    "complex_cot": {"Question": "咳嗽？", "Complex_CoT": "想\n想", "Response": "多喝水"},
    "think_answer": {"question": "咳嗽？", "think": "想\n想", "answer": "多喝水"},
    "messages": {
        "messages": [
            {"role": "system", "content": "医生"},
            {"role": "user", "content": [{"type": "text", "text": "咳嗽？"}]},
            {"role": "assistant", "content": "多喝水", "reasoning_content": "想\n想"},
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "咳嗽？"}, {"from": "gpt", "value": "想\n想</think>多喝水"}]
    },
    "conversation": {
        "conversation": [{"role": "user", "content": "咳嗽？"}, {"role": "bot", "content": "想\n想</think>多喝水"}]
    },
    "prompt_completion": {"prompt": "咳嗽？", "completion": "<think>想\n想</think>多喝水"},
    "preceptor": json.loads(OURS.model_dump_json()),
}
ASKED = ("instruction", "complex_cot", "think_answer", "messages", "sharegpt", "conversation", "prompt_completion")


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_is_known_by_its_fields(name):
    assert set(ROWS) == set(LAYOUTS)
    assert detect([ROWS[name]] * 3) == name
    assert detect([{"what": 1}, ROWS[name]]) == name
    odd = {" ".join(key.upper().split("_")): value for key, value in ROWS[name].items()}
    assert detect([odd]) == name
    assert LAYOUTS[name](odd).text == LAYOUTS[name](ROWS[name]).text


def test_ddxplus_is_known_by_its_fields():
    assert detect([{"AGE": "1", "SEX": "F", "PATHOLOGY": "x", "EVIDENCES": "[]"}]) == DDXPLUS


def test_an_unknown_layout_names_what_was_seen():
    with pytest.raises(UserError, match=r"its rows have 主诉, 诊断, feature_content\. Map.*healthai \(feat"):
        detect([{"主诉": "x"}, {"主诉": "x", "诊断": "y"}, {"feature_content": "x"}])
    with pytest.raises(UserError, match="no row of it can be read"):
        detect([])


def test_a_competition_case():
    case = LAYOUTS["healthai"](ROWS["healthai"] | {"diseases": None, "hospital": {"a": [1]}})
    assert (case.id, case.text, case.language, case.source, case.gold) == ("7", RECORD, "zh", "healthai", None)
    assert case.meta == {"hospital": {"a": [1]}}
    labelled = LAYOUTS["healthai"](ROWS["healthai"] | {"diseases": "肺炎", "reason": "咳嗽"})
    assert labelled.gold == Diagnosis(diseases=("肺炎",), reason=("咳嗽",)), "labels may begin anywhere in a file"
    assert case.group == LAYOUTS["healthai"](ROWS["healthai"] | {"id": 8, "feature_content": RECORD + "\r\n"}).group


def test_a_labelled_case():
    case = LAYOUTS["healthai_labelled"](ROWS["healthai_labelled"])
    assert case.gold == Diagnosis(diseases=("支气管炎", "发热待查"), reason=("咳嗽3天", "无胸痛"))
    assert (case.gold_source, case.meta) == ("file", {"bingli_diseases": ["支气管炎", "发热"]})
    only = LAYOUTS["healthai_labelled"](ROWS["healthai_labelled"] | {"diseases": None})
    assert only.gold == Diagnosis(diseases=("支气管炎", "发热"), reason=("咳嗽3天", "无胸痛"))


def test_a_submission():
    case = LAYOUTS["healthai_submission"](ROWS["healthai_submission"] | {"extra": 1})
    assert case.gold == Diagnosis(diseases=("支气管炎", "高血压（1级）"), reason=("咳嗽3天", "38.5℃；无胸痛"))
    assert (case.gold_source, case.meta) == ("file", {"extra": 1})
    blank = LAYOUTS["healthai_submission"](ROWS["healthai_submission"] | {"diseases": "", "reason": ""})
    assert (blank.gold, blank.gold_source) == (None, None)


def test_a_record_goes_back_as_the_file_had_it():
    """Only where it was changed on the way in is it kept beside the text."""
    raw = "主诉: 咳嗽 \r\n现病史: \n"
    case = LAYOUTS["healthai"]({"id": 1, "feature_content": raw})
    assert case.text != raw
    assert case.meta == {"feature_content": raw}
    assert LAYOUTS["healthai"]({"id": 1, "feature_content": "主诉: 咳嗽"}).meta == {}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_with_its_answer(name):
    case = LAYOUTS[name](ROWS[name] | {"extra": [1]})
    assert (case.text, case.language, case.source) == ("答\n咳嗽？" if name == "instruction" else "咳嗽？", "zh", name)
    assert case.gold == Consultation(think="想\n想", answer="多喝水")
    assert case.gold_source == "file"
    own = {"instruction": {"k": 1}, "messages": {"system": "医生"}}
    assert case.meta == {"extra": [1]} | own.get(name, {})
    assert case.id.startswith("row-")


@pytest.mark.parametrize("name", ASKED)
def test_a_diagnosis_in_json_is_one(name):
    said = '{"diseases": ["感冒"], "reason": ["咳嗽"]}'
    last = {
        "messages": {"messages": [{"role": "user", "content": "咳嗽？"}, {"role": "assistant", "content": said}]},
        "sharegpt": {"conversations": [{"from": "user", "value": "咳嗽？"}, {"from": "assistant", "value": said}]},
        "conversation": {
            "conversation": [{"role": "user", "content": "咳嗽？"}, {"role": "assistant", "content": said}]
        },
        "prompt_completion": {"prompt": [{"role": "user", "content": "咳嗽？"}], "completion": said},
        "instruction": {"output": f"<think>想</think>{said}"},
        "complex_cot": {"Response": said},
        "think_answer": {"answer": said},
    }
    case = LAYOUTS[name](ROWS[name] | last[name])
    assert case.gold == Diagnosis(diseases=("感冒",), reason=("咳嗽",))
    assert case.meta.get("think") == {"instruction": "想", "complex_cot": "想\n想", "think_answer": "想\n想"}.get(name)


def test_what_came_before_the_last_reply_is_the_text():
    turns = [{"from": who, "value": said} for who, said in (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]
    case = LAYOUTS["sharegpt"]({"conversations": turns})
    assert case.text == "user: a\nassistant: b\nuser: c"
    assert case.gold == Consultation(answer="d")
    assert LAYOUTS["sharegpt"]({"conversations": turns[:1]}).gold is None


def test_what_this_project_writes_is_read_as_it_was():
    assert LAYOUTS["preceptor"](ROWS["preceptor"]) == OURS


def test_an_instruction_alone_is_the_text():
    case = LAYOUTS["instruction"]({"instruction": "咳嗽？", "input": "", "output": "", "meta": "m", "id": 3.0})
    assert (case.text, case.gold, case.meta, case.id) == ("咳嗽？", None, {"input": "", "meta": "m"}, "3")


@pytest.mark.parametrize(
    ("name", "change", "field", "reason"),
    [
        ("healthai", {"id": None}, "id", "missing"),
        ("healthai", {"id": " "}, "id", "missing"),
        ("healthai", {"id": True}, "id", "neither"),
        ("healthai", {"id": 1.5}, "id", "neither"),
        ("healthai", {"feature_content": 3}, "feature_content", "not a text"),
        ("healthai_labelled", {"bingli_json": "{", "diseases": ""}, "bingli_json", "it ends before its JSON does"),
        ("healthai_submission", {"diseases": [[]]}, "diseases", "no known form"),
        ("instruction", {"input": "", "instruction": " "}, "instruction", "empty"),
        ("instruction", {"output": "<think>想"}, "output", "it ends in its thinking"),
        ("instruction", {"output": "<think>想</think>\n"}, "output", "it ends in its thinking"),
        ("instruction", {"output": 3}, "output", "not a text"),
        ("think_answer", {"think": ["x"]}, "think", "not a text"),
        ("messages", {"messages": "x"}, "messages", "no list"),
        ("messages", {"messages": ["x"]}, "messages", "must be an object"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "a message of 'tool'"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "messages", "whose content is NoneType"),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "nobody asks"),
        ("preceptor", {"more": 1}, "more", "not permitted"),
        ("preceptor", {"language": "fr"}, "language", "zh"),
    ],
)
def test_a_row_that_makes_no_case(name, change, field, reason):
    with pytest.raises(BadRow) as caught:
        LAYOUTS[name](ROWS[name] | change)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_what_instructs_many_rows_is_a_prompt():
    rows = [{"instruction": "答", "input": f"咳嗽{n}？", "output": "多喝水"} for n in range(3)]
    own = {"instruction": "能吃西瓜吗？", "input": "患者男，60岁", "output": "能"}
    read = instruction_importer([*rows, own])
    assert (read(rows[0]).text, read(rows[0]).meta) == ("咳嗽0？", {"instruction": "答"})
    assert (read(own).text, read(own).meta) == ("能吃西瓜吗？\n患者男，60岁", {})


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("preceptor", "instruction")])
@pytest.mark.parametrize("field", ["meta", "metadata"])
def test_metadata_may_be_an_object_or_its_text(name, field):
    said = {"source": "red_team_safety", "risk_level": "high"}
    for written in (said, json.dumps(said)):
        assert LAYOUTS[name](ROWS[name] | {field: written}).meta.items() >= said.items()


def test_earlier_turns_are_asked_without_their_thinking():
    turns = [
        ("user", "问1"),
        ("assistant", "<think>想</think>答1"),
        ("user", "问2"),
        ("assistant", "<think>再想</think>答2"),
    ]
    messages = [{"role": role, "content": said} for role, said in turns]
    case = LAYOUTS["messages"]({"messages": messages})
    assert (case.text, case.gold) == ("user: 问1\nassistant: 答1\nuser: 问2", Consultation(think="再想", answer="答2"))
    assert LAYOUTS["messages"]({"messages": json.dumps(messages)}).text == case.text


@pytest.mark.parametrize("none", ["nan", "NULL", " ", None, "N/A", "待查", "pending?"])
def test_a_label_that_is_none(none):
    assert LAYOUTS["healthai_submission"](ROWS["healthai_submission"] | {"diseases": none}).gold is None


def test_no_completion_is_no_label():
    assert LAYOUTS["prompt_completion"]({"prompt": "咳嗽？", "completion": ""}).gold is None


def test_broken_labels_beside_whole_ones_cost_nothing():
    row = ROWS["healthai_labelled"] | {"bingli_json": "{", "diseases": "肺炎"}
    case = LAYOUTS["healthai_labelled"](row)
    assert (case.gold, case.meta["bingli_json"]) == (Diagnosis(diseases=("肺炎",)), "{")


ANY = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(ROWS)), st.data())
def test_whatever_a_row_holds_it_makes_a_case_or_a_bad_row(name, data):
    fields = data.draw(st.lists(st.sampled_from(sorted(ROWS[name])), min_size=1, max_size=2))
    row = ROWS[name] | {field: data.draw(ANY) for field in fields}
    with contextlib.suppress(BadRow):
        assert isinstance(LAYOUTS[name](row), Case)


def test_ids_come_from_what_a_row_says():
    row = {"a": 1, "b": "发热"}
    assert digest_id(row) == digest_id(dict(reversed(row.items()))) != digest_id(row | {"a": 2})


@pytest.mark.parametrize(
    ("text", "language"),
    [(RECORD, "zh"), ("cough 3 days", "en"), ("ALT/AST 109/95，HBVDNA 3.06E+4，肝功能", "zh")],
)
def test_language(text, language):
    assert language_of(text) == language
