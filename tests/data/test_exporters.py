"""What other programs are given: the layouts by their exact bytes, and submissions that read back as they were said."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.core.errors import UserError
from preceptor.core.records import (
    Case,
    Consultation,
    Diagnosis,
    Failure,
    FailureKind,
    Message,
    Prediction,
    Row,
    Withheld,
)
from preceptor.data.answers import Index, Joined
from preceptor.data.answers import read as read_answers
from preceptor.data.exporters import SubmissionStyle, llamafactory, ms_swift, submission
from preceptor.data.files import Imported, importer_of, read, sniff
from preceptor.tasks.diagnosis import canonical, parse

RECORD = "性别: 男\n年龄: 48\n主诉: 咳嗽3天\n婚育史: "
SYSTEM, USER = Message(role="system", content="你是医生。"), Message(role="user", content="<record>\n咳嗽\n</record>")
PLAIN = Row(id="a", messages=(SYSTEM, USER), answer='{"diseases": ["肺炎"], "reason": ["咳嗽"]}', case_id="c1")
SHOWN = (SYSTEM, Message(role="user", content="例"), Message(role="assistant", content="感冒"), USER)
FEW_SHOT = Row(id="b", messages=SHOWN, answer="肺炎\n\u2028", case_id="c2")
STYLES = [
    SubmissionStyle(separator=separator, reason_separator=reason_separator, numbering=numbering)
    for separator in ("；", ";", "；\n", "\n")
    for reason_separator in ("；\n", "；", "\n")
    for numbering in ("none", "several", "all")
]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def case(identity: str, text: str = RECORD, **meta: Any) -> Case:
    return Case(id=identity, text=text, language="zh", source="t", group="g", meta=meta)


def said(case_id: str, *diseases: str, reason: tuple[str, ...] = ()) -> Prediction:
    output = Diagnosis(diseases=diseases, reason=reason)
    return Prediction(case_id=case_id, model="m", prompt_sha="", output=output)


def written(path: Path, predictions: list[Prediction], style: SubmissionStyle, *cases: Case) -> list[Any]:
    submission(cases or [case(p.case_id) for p in predictions], {p.case_id: p for p in predictions}, style, path)
    return lines(path)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_llamafactory_finds_its_files_and_columns(tmp_path: Path) -> None:
    llamafactory([PLAIN, FEW_SHOT], [PLAIN], tmp_path / "new")
    described = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    assert json.loads((tmp_path / "new" / "dataset_info.json").read_text("ascii")) == {
        "preceptor": {"file_name": "train.jsonl", **described},
        "preceptor_validation": {"file_name": "validation.jsonl", **described},
    }
    first, second = lines(tmp_path / "new" / "train.jsonl")
    asked = [turn("system", "你是医生。"), turn("user", "<record>\n咳嗽\n</record>")]
    assert first == {"messages": [*asked, turn("assistant", PLAIN.answer)]}
    shown = [turn("user", "例"), turn("assistant", "感冒")]
    assert second == {"messages": [asked[0], *shown, asked[1], turn("assistant", "肺炎\n\u2028")]}
    assert lines(tmp_path / "new" / "validation.jsonl") == [first]


def test_ms_swift_learns_the_last_answer_alone(tmp_path: Path) -> None:
    ms_swift([PLAIN, FEW_SHOT], [], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]
    plain, shown = (row["messages"] for row in lines(tmp_path / "train.jsonl"))
    assert plain[-1] == turn("assistant", PLAIN.answer)
    assert shown[2] == turn("assistant", "感冒", loss=False)
    assert shown[-1] == turn("assistant", "肺炎\n\u2028")


@pytest.mark.parametrize("export", [llamafactory, ms_swift])
def test_the_library_that_both_read_with_reads_it(export: Any, tmp_path: Path) -> None:
    from datasets import load_dataset

    export([PLAIN, FEW_SHOT], [PLAIN], tmp_path)
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    data = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert [row["messages"][-1]["content"] for row in data["train"]] == [PLAIN.answer, FEW_SHOT.answer]
    assert len(data["validation"]) == 1


def test_no_rows_are_refused_and_no_validation_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rows to export"):
        llamafactory([], [PLAIN], tmp_path)
    assert list(tmp_path.iterdir()) == []
    llamafactory([PLAIN], [PLAIN], tmp_path)
    llamafactory([PLAIN], [], tmp_path)  # an earlier export's validation is not this one's
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "train.jsonl"]
    assert list(json.loads((tmp_path / "dataset_info.json").read_text())) == ["preceptor"]


def test_what_fails_midway_leaves_the_old_file(tmp_path: Path) -> None:
    def breaking() -> Any:
        yield PLAIN
        raise OSError(28, "No space left on device")

    llamafactory([FEW_SHOT], [], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space"):
        llamafactory(breaking(), [], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("style", "diseases", "reason"),
    [
        ({}, "1. 高尿酸血症；2. 皮炎", "1. 尿酸高；\n2. 皮疹"),
        ({"separator": ";", "reason_separator": "；"}, "1. 高尿酸血症;2. 皮炎", "1. 尿酸高；2. 皮疹"),
        ({"separator": "；\n", "numbering": "all"}, "1. 高尿酸血症；\n2. 皮炎", "1. 尿酸高；\n2. 皮疹"),
        ({"separator": "\n"}, "1. 高尿酸血症\n2. 皮炎", "1. 尿酸高；\n2. 皮疹"),
        ({"numbering": "none"}, "高尿酸血症；皮炎", "1. 尿酸高；\n2. 皮疹"),
    ],
)
def test_styles(style: dict[str, Any], diseases: str, reason: str, tmp_path: Path) -> None:
    answer = said("7", "高尿酸血症", "皮炎", reason=("尿酸高", "皮疹"))
    (row,) = written(tmp_path / "s.jsonl", [answer], SubmissionStyle(**style))
    assert list(row.items()) == [("id", 7), ("reason", reason), ("diseases", diseases), ("feature_content", RECORD)]


@pytest.mark.parametrize(("numbering", "alone"), [("none", "发热"), ("several", "发热"), ("all", "1. 发热")])
def test_one_disease_alone(numbering: Any, alone: str, tmp_path: Path) -> None:
    (row,) = written(tmp_path / "s.jsonl", [said("7", "发热")], SubmissionStyle(numbering=numbering))
    assert (row["diseases"], row["reason"]) == (alone, "")


def test_ids_are_as_their_source_had_them_once_and_in_order(tmp_path: Path) -> None:
    ids = ["10001", "3", "0", "007", "-5", "-0", "+1", "1.0", "1e3", "٣", "a-1", "row-00ff", "12345678901234567890"]
    rows = written(tmp_path / "s.jsonl", [said(identity, "流感") for identity in ids], SubmissionStyle())
    numbers = {"10001", "3", "0", "-5", "12345678901234567890"}
    assert [row["id"] for row in rows] == [int(one) if one in numbers else one for one in ids]
    assert b'{"id": 10001, ' in (tmp_path / "s.jsonl").read_bytes()


def test_a_case_that_comes_twice_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^s\.jsonl: case '7' comes twice"):
        written(tmp_path / "s.jsonl", [said("7", "流感")], SubmissionStyle(), case("7"), case("8"), case("7"))
    assert list(tmp_path.iterdir()) == []


def test_advice_is_no_submission(tmp_path: Path) -> None:
    advice = Prediction(case_id="7", model="m", prompt_sha="", output=Consultation(answer="多喝水"))
    with pytest.raises(UserError, match="case '7' was answered with advice"):
        written(tmp_path / "s.jsonl", [advice], SubmissionStyle())


def test_what_a_risk_withheld_is_told_apart(tmp_path: Path) -> None:
    held = Withheld(output=Diagnosis(diseases=("流感",)), confidence=0.4, threshold=0.75)
    doubtful = Prediction(case_id="7", model="m", prompt_sha="", output=Diagnosis(), withheld=held)
    report = submission([case("7")], {"7": doubtful}, SubmissionStyle(), tmp_path / "s.jsonl")
    why = "withheld: 流感 at 0.40, below 0.75; leave `risk` out of calibrate to submit it"
    assert report.failed == (("7", why),)


def test_what_names_no_disease_gets_the_fallback_and_is_listed(tmp_path: Path) -> None:
    failure = Failure(kind=FailureKind.TRUNCATED, detail="the reply ends before its JSON does")
    predictions = {
        "1": said("1", "流感"),
        "2": Prediction(case_id="2", model="m", prompt_sha="", failure=failure),
        "3": said("3", reason=("咳嗽",)),
        "9": said("9", "别的"),
    }
    cases = [case(identity) for identity in "1234"]
    for fallback in ("", "发热；待查"):
        style = SubmissionStyle(fallback=fallback)
        report = submission(cases, predictions, style, tmp_path / "s.jsonl")
        assert [row["diseases"] for row in lines(tmp_path / "s.jsonl")] == ["流感", fallback, fallback, fallback]
        assert [row["reason"] for row in lines(tmp_path / "s.jsonl")] == ["", "", "1. 咳嗽", ""]
        assert report.cases == 4
        why = "truncated: the reply ends before its JSON does"
        assert report.failed == (("2", why), ("3", "abstained"), ("4", "no prediction"))
        assert report.ambiguous == ()


def test_the_record_is_the_sources(tmp_path: Path) -> None:
    """What the importer took off the text is kept in the metadata."""
    raw = f" {RECORD}\r\n\t既往史: \u2028 "
    rows = written(tmp_path / "s.jsonl", [], SubmissionStyle(), case("1", feature_content=raw), case("2"))
    assert [row["feature_content"] for row in rows] == [raw, RECORD]


@pytest.mark.parametrize(
    ("answer", "doubt"),
    [
        (said("1", "肺炎", "待查"), "its diseases read as ['肺炎'], not ['肺炎', '待查']"),
        (said("1", "肺炎；贫血"), "its diseases read as ['肺炎', '贫血'], not ['肺炎；贫血']"),
        (said("1", "流感", reason=("1. 咳嗽",)), "its reasons read as ['咳嗽'], not ['1. 咳嗽']"),
        (said("1", "待查"), "its diseases read as [], not ['待查']"),
        (said("1", "[]"), "it names diseases in no known form"),
    ],
)
def test_strings_that_would_be_taken_apart_otherwise_are_listed(answer: Prediction, doubt: str, tmp_path: Path) -> None:
    report = submission([case("1")], {"1": answer}, SubmissionStyle(), tmp_path / "s.jsonl")
    assert report.ambiguous == (("1", doubt),)
    assert report.failed == ()


WORDS = st.sampled_from(
    ["肺炎", "2型糖尿病", "高血压3级（极高危）", "PCOS", "acute otitis media", "T36.8℃", "咳嗽3天", "B超", "γ-GT"]
)
POINTS = st.lists(WORDS, min_size=1, max_size=6, unique=True).map(tuple)


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(st.tuples(POINTS, POINTS), max_size=5), style=st.sampled_from(STYLES))
def test_what_is_written_reads_back(
    answers: list[tuple[tuple[str, ...], tuple[str, ...]]], style: SubmissionStyle, tmp_path_factory: Any
) -> None:
    """With our own importer, and as another tool's predictions."""
    path = tmp_path_factory.mktemp("s") / "s.jsonl"
    predictions = [said(str(at * 7), *names, reason=reason) for at, (names, reason) in enumerate(answers)]
    cases = [case(p.case_id, f"{RECORD}\n编号: {p.case_id}") for p in predictions]
    report = submission(cases, {p.case_id: p for p in predictions}, style, path)
    assert report.ambiguous == report.failed == ()
    if not answers:
        assert path.read_bytes() == b""
        return
    assert sniff(path) == "healthai_submission"
    found = [item.case for item in read(path, importer_of("healthai_submission", path)) if isinstance(item, Imported)]
    assert [(one.id, one.text, one.gold) for one in found] == [
        (c.id, c.text, p.output) for c, p in zip(cases, predictions, strict=True)
    ]
    joined = [item.prediction for item in read_answers(path, "m", Index(cases)) if isinstance(item, Joined)]
    assert [(p.case_id, p.output) for p in joined] == [(p.case_id, p.output) for p in predictions]


LOOSE = st.lists(
    st.text(st.sampled_from("肺炎咳嗽 ab12.、；;,，()（）\"'[]{}无待查\n\\n一①-"), max_size=9), max_size=4
).map(tuple)


@settings(max_examples=300, deadline=None)
@given(names=LOOSE, reason=LOOSE, style=st.sampled_from(STYLES))
def test_whatever_a_model_says_reads_back_or_is_listed(
    names: tuple[str, ...], reason: tuple[str, ...], style: SubmissionStyle, tmp_path_factory: Any
) -> None:
    output = parse(canonical(Diagnosis(diseases=names, reason=reason))).output or Diagnosis()
    answer = Prediction(case_id="7", model="m", prompt_sha="", output=output)
    path = tmp_path_factory.mktemp("s") / "s.jsonl"
    report = submission([case("7")], {"7": answer}, style, path)
    (item,) = (item for item in read(path, importer_of("healthai_submission", path)))
    gold = item.case.gold if isinstance(item, Imported) else None
    listed = [identity for identity, _ in (*report.failed, *report.ambiguous)]
    assert listed == ([] if gold == output and output.diseases else ["7"])
