"""Rows of other tools find their cases; what they said goes through the one parser; nothing is lost silently."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor import api
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Diagnosis, FailureKind, Issue, Prediction
from preceptor.data.answers import Index, Joined, asked, predictions, read
from preceptor.tasks.prompts import load

GOOD = '{"diseases": ["肺炎"], "reason": ["发热3天"]}'
TEXTS = (
    "性别: 男\n年龄: 65\n主诉: 发热10天\n现病史: 患者10天前无明显诱因出现发热，最高36.7℃，无咳嗽咳痰。\n既往史: 无",
    "性别: 女\n年龄: 30\n主诉: 右下腹痛1天\n现病史: 患者1天前出现转移性右下腹痛，伴恶心，无腹泻。\n既往史: 无",
    "Sex: male\nAge: 7\nChief complaint: wheeze at night\nHistory: Wheeze for 2 weeks, worse after exercise.",
)


def case(identity: str, text: str) -> Case:
    return Case(id=identity, text=text, language="zh", source="test", group=identity)


CASES = [case(f"c{i}", text) for i, text in enumerate(TEXTS)]


def chatml(text: str) -> str:
    system = "<|im_start|>system\nYou are a doctor.<|im_end|>\n"
    return f"{system}<|im_start|>user\n请诊断：\n{text}<|im_end|>\n<|im_start|>assistant\n"


def plain(text: str) -> str:
    return f"system\nYou are a doctor.\nuser\n请诊断：\n{text}\nassistant\n"


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), "utf-8"
    )
    return path


def joined(path: Path, cases: list[Case] | None = None) -> tuple[list[tuple[str, int, Any]], list[Issue]]:
    """The case, sample and diseases, or the failure, of each prediction; and the issues."""
    found, issues = [], []
    for one in read(path, "theirs", Index(CASES if cases is None else cases)):
        if isinstance(one, Issue):
            issues.append(one)
            continue
        p = one.prediction
        assert p.model == "theirs"
        said = list(p.output.diseases) if isinstance(p.output, Diagnosis) else p.failure and p.failure.kind
        found.append((p.case_id, p.sample, said))
    return found, issues


ORDER = (2, 0, 1)
LAYOUTS = {
    "llamafactory": lambda i: {"prompt": chatml(TEXTS[i]), "predict": GOOD, "label": GOOD},
    "llamafactory without special tokens": lambda i: {"prompt": plain(TEXTS[i]), "predict": GOOD, "label": GOOD},
    "llamafactory, spaces and width changed": lambda i: {
        "prompt": chatml(TEXTS[i].replace(": ", "：").replace("\n", " ")),
        "predict": GOOD,
        "label": GOOD,
    },
    "our prompt": lambda i: {
        "prompt": "\n".join(m.content for m in load("diagnosis", "zero_shot", "zh").render(TEXTS[i])),
        "predict": GOOD,
        "label": "",
    },
    "swift": lambda i: {
        "response": GOOD,
        "labels": GOOD,
        "logprobs": None,
        "messages": [{"role": "user", "content": f"请诊断：{TEXTS[i]}"}, {"role": "assistant", "content": GOOD}],
    },
    "older swift": lambda i: {
        "system": None,
        "query": f"请诊断 {TEXTS[i]}",
        "response": GOOD,
        "label": GOOD,
        "history": [],
    },
    "id and output": lambda i: {"id": f"c{i}", "output": GOOD},
    "case_id and prediction": lambda i: {"Case ID": f"c{i}", "prediction": {"diseases": ["肺炎"]}},
    "id and names": lambda i: {"id": f"c{i}", "prediction": ["肺炎"]},
    "id, record and names": lambda i: {"id": f"c{i}", "text": TEXTS[i], "diseases": ["肺炎"]},
    "id and text": lambda i: {"qid": f"c{i}", "text": GOOD},
    "vllm": lambda i: {"prompt": chatml(TEXTS[i]), "outputs": [{"text": GOOD, "finish_reason": "stop"}]},
    "pipeline": lambda i: {
        "id": f"c{i}",
        "generated_text": [{"role": "user", "content": "?"}, {"role": "assistant", "content": GOOD}],
    },
    "openai batch": lambda i: {
        "id": "batch_req_1",
        "custom_id": f"c{i}",
        "error": None,
        "response": {"status_code": 200, "body": {"choices": [{"message": {"role": "assistant", "content": GOOD}}]}},
    },
    "submission": lambda i: {
        "id": f"c{i}",
        "reason": "1. 发热；\\n2. 咳嗽",
        "diseases": "肺炎",
        "feature_content": TEXTS[i],
    },
    "submission without ids": lambda i: {"reason": "发热", "diseases": "1. 肺炎", "feature_content": TEXTS[i]},
    "predicted beside true": lambda i: {"id": f"c{i}", "diagnosis": "哮喘", "predicted_diagnosis": "肺炎"},
    "in Chinese": lambda i: {"编号": f"c{i}", "诊断": "肺炎", "诊断依据": "发热"},
    "ours": lambda i: Prediction(
        case_id=f"c{i}", model="student", prompt_sha="0", output=Diagnosis(diseases=("肺炎",))
    ).model_dump(mode="json"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_find_their_cases_in_any_order(layout: str, tmp_path: Path) -> None:
    path = written(tmp_path / "theirs.jsonl", [LAYOUTS[layout](i) for i in ORDER])
    assert joined(path) == ([(f"c{i}", 0, ["肺炎"]) for i in ORDER], [])


def test_tables_are_read(tmp_path: Path) -> None:
    rows = [
        ("id", "diseases", "reason"),
        ("10001", "1. 肺炎；2. 哮喘", "1. 发热；2. 气喘"),
        ("10002.0", "", ""),
        ("10003", "无", ""),
    ]
    with (tmp_path / "sub.csv").open("w", encoding="gb18030", newline="") as file:
        csv.writer(file).writerows(rows)
    cases = [case(str(i), TEXTS[0]) for i in (10001, 10002, 10003)]
    expected = [("10001", 0, ["肺炎", "哮喘"]), ("10002", 0, FailureKind.EMPTY), ("10003", 0, [])]
    assert joined(tmp_path / "sub.csv", cases) == (expected, [])
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["病例编号", "诊断结果"])
    book.active.append([10001, "肺炎，哮喘"])
    book.active.append([10003, "哮喘"])
    book.save(tmp_path / "sub.xlsx")
    assert joined(tmp_path / "sub.xlsx", cases)[0] == [("10001", 0, ["肺炎", "哮喘"]), ("10003", 0, ["哮喘"])]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"predict": ""}, FailureKind.EMPTY),
        ({"response": None}, FailureKind.EMPTY),
        ({"response": None, "error": {"message": "rate limit"}}, FailureKind.PROVIDER),
        ({"predict": "I'm sorry, I can't."}, FailureKind.REFUSED),
        ({"predict": '{"diseases": ["肺'}, FailureKind.TRUNCATED),
        ({"predict": "肺炎，哮", "finish_reason": "length"}, FailureKind.TRUNCATED),
        ({"outputs": [{"text": "肺", "finish_reason": "length"}]}, FailureKind.TRUNCATED),
        (
            {"response": {"choices": [{"message": {"content": "?"}, "finish_reason": "content_filter"}]}},
            FailureKind.REFUSED,
        ),
        ({"predict": "患者需要进一步检查"}, FailureKind.UNPARSED),
        ({"diseases": None, "reason": "发热"}, FailureKind.EMPTY),
        ({"diseases": "nan"}, FailureKind.EMPTY),
    ],
)
def test_failures_are_told_apart_and_keep_the_reply(row: dict[str, Any], kind: FailureKind, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [{"id": "c0", **row}])
    assert joined(path) == ([("c0", 0, kind)], [])
    (one,) = read(path, "theirs", Index(CASES))
    assert isinstance(one, Joined)
    assert one.prediction.text in ("", "肺", "?", row.get("predict"))


def test_samples_are_counted(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.jsonl",
        [
            {"id": "c0", "outputs": ["肺炎", "哮喘"]},
            {"id": "c0", "output": "皮炎"},
            {"id": "c1", "responses": ["肺炎"]},
        ],
    )
    assert joined(path)[0] == [("c0", 0, ["肺炎"]), ("c0", 1, ["哮喘"]), ("c0", 2, ["皮炎"]), ("c1", 0, ["肺炎"])]


def test_records_that_are_the_same_share_the_rows(tmp_path: Path) -> None:
    twins = [case("a", TEXTS[0]), case("b", TEXTS[0]), case("c", TEXTS[1])]
    path = written(tmp_path / "p.jsonl", [LAYOUTS["llamafactory"](i) for i in (0, 1, 0)])
    assert [c for c, _, _ in joined(path, twins)[0]] == ["a", "c", "b"]


def test_the_record_asked_about_is_the_last_and_longest(tmp_path: Path) -> None:
    part = case("part", TEXTS[1][: TEXTS[1].index("\n既往史")])
    path = written(tmp_path / "p.jsonl", [{"prompt": f"例：{TEXTS[0]}\n答：肺炎\n现在：{TEXTS[1]}", "predict": GOOD}])
    assert joined(path, [part, *CASES])[0] == [("c1", 0, ["肺炎"])]


def test_cut_prompts_are_joined_by_their_place_and_it_is_said(tmp_path: Path) -> None:
    cut = [{"prompt": chatml(text[: len(text) // 2]), "predict": GOOD, "label": GOOD} for text in TEXTS]
    whole = [*cut[:1], LAYOUTS["llamafactory"](1), *cut[2:]]
    found, issues = joined(written(tmp_path / "p.jsonl", whole))
    assert [c for c, _, _ in found] == ["c0", "c1", "c2"]
    assert [(i.line, i.field, i.action) for i in issues] == [(1, "prompt", "kept"), (3, "prompt", "kept")]
    bare = written(tmp_path / "bare.jsonl", [{"response": GOOD} for _ in TEXTS])
    assert [c for c, _, _ in joined(bare)[0]] == ["c0", "c1", "c2"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"predict": GOOD}] * 2, "there is no prompt, and there are not as many rows as cases"),
        ([{"prompt": chatml(TEXTS[0][:30]), "predict": GOOD}] * 4, "rows and cases are not as many, in one order"),
        (
            [{"prompt": chatml(text), "predict": GOOD} for text in (TEXTS[1], TEXTS[1][:30], TEXTS[2][:30])],
            "rows and cases are not as many, in one order",
        ),
        ([{"prompt": "x" * 90, "predict": GOOD}] * 3, "it holds no part of the record in its place"),
        ([{"id": "other", "predict": GOOD}] * 3, "no case 'other', and none whose record the row holds"),
        ([{"id": "c0", "note": 1}], "no reply and no diseases in it; it has id, note"),
        (["{broken"], "not JSON"),
        (["[1]"], "a row must be an object"),
    ],
)
def test_rows_about_no_case_are_reported(rows: list[Any], reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", rows)
    found, issues = joined(path)
    dropped = [issue for issue in issues if issue.action == "dropped"]
    assert len(found) + len(dropped) == len(rows)
    assert dropped
    assert all(issue.file == str(path) and reason in issue.reason for issue in dropped)
    assert [issue.line for issue in dropped] == sorted(issue.line for issue in dropped)


@pytest.mark.parametrize(
    "row", ["llamafactory", "llamafactory without special tokens", "our prompt", "swift", "older swift"]
)
def test_prompts_and_labels_become_cases(row: str, tmp_path: Path) -> None:
    rows = [LAYOUTS[row](i) | {"label": GOOD} for i in ORDER]
    path = written(tmp_path / "p.jsonl", rows)
    made = list(asked(path))
    assert [one.text.removeprefix("请诊断：").strip().removeprefix("请诊断 ") for one in made] == [
        TEXTS[i] for i in ORDER
    ]
    assert all(one.gold is None for one in made)
    found, issues = joined(path, made)
    assert ([c for c, _, _ in found], issues) == ([one.id for one in made], [])


def test_labels_stand_beside_predictions(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [LAYOUTS["llamafactory"](0), {"id": "c1", "predict": "肺炎"}])
    assert [one.label for one in read(path, "m", Index(CASES)) if isinstance(one, Joined)] == [GOOD, ""]


def test_without_cases_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [{"id": 7, "predict": GOOD}, {"prompt": "?", "predict": GOOD}])
    first, second = predictions(path, "m")
    assert isinstance(first, Prediction)
    assert first.case_id == "7"
    assert isinstance(second, Issue)
    assert (second.line, second.field) == (2, "id")


def test_the_notebook_reads_them_too(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", [LAYOUTS["llamafactory"](i) for i in ORDER])
    assert [p.case_id for p in api.load_predictions(path, CASES, "m")] == [f"c{i}" for i in ORDER]
    with pytest.raises(UserError, match=r"p\.jsonl:1: id: missing"):
        api.load_predictions(path, model="m")
    own = written(tmp_path / "own.jsonl", [LAYOUTS["ours"](0)])
    assert [p.model for p in api.load_predictions(own)] == ["student"]
    assert [p.model for p in api.load_predictions(own, model="m")] == ["m"]


@given(st.permutations(range(6)), st.integers(0, 5))
def test_every_whole_record_is_found_in_its_prompt(order: list[int], other: int) -> None:
    texts = [f"主诉: 头痛{'很' * i}{i}天\n现病史: 患者自述不适，程度{i}级，无发热。\n既往史: 体健" for i in range(6)]
    index = Index(case(str(i), text) for i, text in enumerate(texts))
    for i in order:
        assert index._held(chatml(texts[other] + "\n" + texts[i])) == [str(i)]
