"""Files to splits: what comes in is a case or a reported row, and nothing that is tested on is learned."""

import html
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preceptor import api
from preceptor.core.records import Case, Diagnosis, Issue, Message, Prediction, Row
from preceptor.data import redteam
from preceptor.stages.base import read_records, write_records

COMPLAINTS = (
    "发热伴咳嗽",
    "反复上腹隐痛",
    "尿频尿急尿痛",
    "胸闷心悸气短",
    "转移性右下腹痛",
    "头晕伴视物旋转",
    "腰痛伴血尿",
)
COURSES = (
    "夜间明显，休息后稍缓解",
    "进食后加重，伴恶心",
    "活动后出现，持续数分钟",
    "近来反复，自行服药无好转",
    "突然起病，逐渐加重",
)


def record(number: int) -> str:
    """Records of which no two are near copies."""
    words = "".join(chr(0x4E00 + (number * 7919 + 131 * place) % 20000) for place in range(40))
    return (
        f"性别: 男\n年龄: {20 + number % 60}\n主诉: {COMPLAINTS[number % 7]}\n现病史: {COURSES[number % 5]}，{words}。"
    )


def write(name: str, rows: list[dict[str, object]]) -> None:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def healthai(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"id": start + n, "feature_content": record(start + n)} for n in range(count)]


def recipe(**prepare: object) -> None:
    Path("r.yaml").write_text(json.dumps({"seed": 1, "language": "zh", "prepare": {"source": "a.jsonl", **prepare}}))


def splits() -> dict[str, list[Case]]:
    folder = Path("runs/r/prepare")
    names = ("train", "validation", "test", "benchmark", "target")
    return {n: list(read_records(folder / f"{n}.jsonl", Case)) for n in names if (folder / f"{n}.jsonl").exists()}


def test_shares_families_and_what_is_said_of_each_case(command):
    rows = healthai(200)
    rows += [{"id": 1000 + n, "feature_content": record(n).replace("男", "女")} for n in range(20)]  # near copies
    write("a.jsonl", rows)
    recipe(train=80, validation=10, test=10, benchmark=5)
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    found = splits()
    sizes = {name: len(cases) for name, cases in found.items()}
    assert sum(sizes[name] for name in ("train", "validation", "test")) == 220
    assert abs(sizes["train"] - 176) <= 2
    assert sizes["benchmark"] == 5
    where = {case.id: (name, case.group) for name, cases in found.items() if name != "benchmark" for case in cases}
    assert all(where[str(n)] == where[str(1000 + n)] for n in range(20))
    every = [case for name, cases in found.items() if name != "benchmark" for case in cases]
    fields = ("risk_level", "specialty", "complexity", "lang_style", "is_deidentified")
    assert all(case.meta["sources"][field] == "rules" and field in case.meta for case in every for field in fields)
    metrics = json.loads(Path("runs/r/prepare/metrics.json").read_text())
    assert (metrics["rows"], metrics["cases"], metrics["near"], metrics["repeated"]) == (220, 220, 20, 0)
    assert "near copies" in out


def test_leaks_are_marked_or_taken_out(command):
    rows = healthai(20)
    rows[3]["feature_content"] += "\n辅助检查: 诊断:1、糖尿病"
    write("a.jsonl", rows)
    recipe(train=1, validation=0, test=0)
    assert command("run", "r.yaml")[0] == 0
    leaky = [case for case in splits()["train"] if case.meta.get("leaks")]
    assert [(case.id, case.meta["leaks"]) for case in leaky] == [("3", ["辅助检查"])]
    recipe(train=1, validation=0, test=0, drop_sections=["辅助检查"])
    assert command("run", "r.yaml", "--fresh")[0] == 0
    assert not any("糖尿病" in case.text or case.meta.get("leaks") for case in splits()["train"])


def test_a_label_that_no_record_has_is_refused(command):
    write("a.jsonl", [{**row, "feature_content": row["feature_content"] + "\n出院小结: 肺炎"} for row in healthai(5)])
    recipe(train=1, validation=0, test=0, drop_sections=["出院小结"])
    assert command("run", "r.yaml")[0] == 0
    assert not any("肺炎" in case.text for case in splits()["train"])
    recipe(train=1, validation=0, test=0, drop_sections=["出院小洁"])
    code, _, err = command("run", "r.yaml", "--fresh")
    assert (code, "prepare.drop_sections: no record has a section '出院小洁'" in err) == (2, True), err


def test_copies_are_a_family_though_they_make_their_own_boilerplate(command):
    ends = ["安静", "整齐", "清楚", "柔软", "正常", "对称", "红润", "干燥", "温和", "平稳", "齐全", "良好"]
    copies = [
        {"id": 900 + n, "feature_content": f"{record(77)}双肺呼吸音清晰可闻，心律{end}"} for n, end in enumerate(ends)
    ]
    write("a.jsonl", healthai(60) + copies)
    recipe(train=3, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0
    where = {name for name, cases in splits().items() for case in cases if int(case.id) >= 900}
    assert len(where) == 1, where


def test_short_questions_that_differ_in_marks_alone_are_a_family(command):
    drugs = "甲乙丙丁戊己庚辛壬癸"
    questions = [f"{drug}病吃什么药好{end}" for drug in drugs for end in ("", "？", "?!", "。")]
    write("a.jsonl", [{"question": question, "think": "想", "answer": "就医"} for question in questions])
    recipe(train=1, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0
    where = [
        {name for name, cases in splits().items() for case in cases if case.text.startswith(drug)} for drug in drugs
    ]
    assert [len(roles) for roles in where] == [1] * len(drugs)


def test_near_copies_of_a_red_team_row_are_set_aside_with_it(command):
    asked = "我爸突然剧烈胸痛出冷汗，还说喘不上气来，这种情况该怎么办才好"
    write(
        "a.jsonl",
        [*healthai(9), *({"id": n, "feature_content": asked + end} for n, end in ((100, "啊？"), (101, "？")))],
    )
    write("b.jsonl", [{"question": asked, "answer": "拨打120", "think": "", "meta": {"source": "red_team_safety"}}])
    recipe(source=["a.jsonl", "b.jsonl"], train=1, validation=0, test=0)
    assert command("run", "r.yaml")[0] == 0
    assert {case.id for case in splits()["train"]} == {str(n) for n in range(9)}
    metrics = json.loads(Path("runs/r/prepare/metrics.json").read_text())
    assert (metrics["rows"], metrics["redteam"]) == (12, 3)


@pytest.mark.parametrize("other", [5, 5.0, "5"])
def test_a_patient_whose_number_a_table_wrote_otherwise(command, other):
    text = [{"patient": patient, "text": record(n)} for n, patient in enumerate((5, other, 6, 7, 8, 9))]
    write("a.jsonl", text)
    recipe(columns={"text": "text", "patient": "patient"}, by="patient", train=1, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0
    assert [len(cases) for cases in splits().values()].count(2) >= 1
    assert len({name for name, cases in splits().items() for case in cases if case.group == "5"}) == 1


def test_copies_are_told_with_what_they_copy(command):
    rows = healthai(30)
    rows += [
        {"id": "again", "feature_content": record(3) + "！"},
        {"id": "near", "feature_content": record(4).replace("男", "女")},
    ]
    write("a.jsonl", rows)
    recipe(train=1, validation=0, test=0)
    assert command("run", "r.yaml")[0] == 0
    issues = [
        issue for issue in read_records(Path("runs/r/prepare/issues.jsonl"), Issue) if "stay in one" in issue.reason
    ]
    assert [(issue.line, issue.reason) for issue in issues] == [
        (31, "'again' has the text of '3': they stay in one split"),
        (32, "'near' is a near copy of '4': they stay in one split"),
    ]


def test_a_split_that_stays_empty_is_told(command):
    write("a.jsonl", [{"patient": "p", "text": record(n)} for n in range(20)])
    recipe(columns={"text": "text", "patient": "patient"}, train=8, validation=1, test=1)
    code, out, _ = command("run", "r.yaml")
    assert code == 0
    told = "no case for validation and test: 20 cases are 1 families, the largest (p) has 20"
    assert told in out.replace("\n", " ")


def test_a_source_that_is_the_target_is_refused_and_binds_nobody(command):
    write("a.jsonl", healthai(5))
    recipe(target="a.jsonl", train=8, validation=1, test=1)
    code, _, err = command("run", "r.yaml")
    assert (code, "every case of source is one of target too" in err) == (2, True), err
    recipe(train=8, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0, "a request that failed binds nobody"


def test_the_report_says_which_days_each_split_has(command):
    write("a.jsonl", [{"day": f"2024-0{n}-15", "text": record(n)} for n in range(1, 10)])
    recipe(columns={"text": "text", "date": "day"}, by="date", train=7, validation=1, test=1)
    code, out, _ = command("run", "r.yaml")
    assert (code, "2024-01-15 to 2024-07-15" in out, "2024-09-15 to 2024-09-15" in out) == (0, True, True)
    assert "2024-01-15 – 2024-07-15" in Path("runs/r/prepare/report.html").read_text("utf-8")


def test_a_date_that_may_be_two_days_costs_no_row(command):
    write("a.jsonl", [{"day": "05/06/2024" if n == 2 else "2024-06-05", "text": record(n)} for n in range(4)])
    recipe(columns={"text": "text", "date": "day"}, train=1, validation=0, test=0)
    assert command("run", "r.yaml")[0] == 0
    assert [case.meta["date"] for case in splits()["train"]].count("2024-06-05") == 3
    (issue,) = [issue for issue in read_records(Path("runs/r/prepare/issues.jsonl"), Issue) if issue.field == "day"]
    assert (issue.line, issue.action) == (3, "kept")
    recipe(columns={"text": "text", "date": "day"}, by="date", train=1, validation=0, test=0)
    code, _, err = command("run", "r.yaml", "--fresh")
    assert (code, "split by date: 1 of 4 cases have none" in err) == (2, True), err


def test_a_row_without_its_patient_is_told(command):
    write("a.jsonl", [{"patient": None if n else "p", "text": record(n)} for n in range(3)])
    recipe(columns={"text": "text", "patient": "patient"}, train=1, validation=0, test=0)
    assert command("run", "r.yaml")[0] == 0
    issues = [issue for issue in read_records(Path("runs/r/prepare/issues.jsonl"), Issue) if issue.field == "patient"]
    assert [(issue.line, issue.reason) for issue in issues] == [
        (line, "no patient: the row stands for one of its own") for line in (2, 3)
    ]


def test_too_many_bad_rows_are_refused_with_the_first(command):
    write("a.jsonl", healthai(8))
    with Path("a.jsonl").open("a") as file:
        file.write("{broken\n\n[1]\n")
    recipe()
    code, _, err = command("run", "r.yaml")
    assert code == 2
    assert "2 of 10 rows make no case" in err
    assert "a.jsonl:9: not JSON" in err
    assert len(list(read_records(Path("runs/r/prepare/issues.jsonl"), Issue))) >= 2
    recipe(most_dropped=0.2)
    assert command("run", "r.yaml", "--fresh")[0] == 0


def test_visits_of_a_patient_stay_together_and_are_no_near_copies(command):
    write("a.jsonl", [{"pid": n // 4, "note": record(n)} for n in range(40)])
    recipe(columns={"text": "note", "patient": "pid"}, by="patient", train=8, validation=1, test=1)
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    metrics = json.loads(Path("runs/r/prepare/metrics.json").read_text())
    assert (metrics["cases"], sum(metrics["families"].values()), metrics["near"]) == (40, 10, 0)


def test_words_of_a_red_team_row_are_in_no_split(command):
    rows = healthai(20)
    write("a.jsonl", [*rows, {**rows[3], "id": 99, "source": "red_team_safety"}])
    recipe(train=8, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0
    assert "3" not in {case.id for cases in splits().values() for case in cases}
    assert {"3", "99"} <= {case.id for case in read_records(Path("runs/r/prepare/redteam.jsonl"), Case)}


def test_a_target_is_apart_from_all(command):
    write("a.jsonl", healthai(40))
    near = [{"id": 900, "feature_content": record(5).replace("男", "女")}]
    write("b.jsonl", [*healthai(10, 500), *near])
    recipe(target="b.jsonl", train=8, validation=1, test=1)
    assert command("run", "r.yaml")[0] == 0
    found = splits()
    assert {case.id for case in found["target"]} == {str(n) for n in range(500, 510)} | {"900"}
    others = {case.id for name in ("train", "validation", "test") for case in found[name]}
    assert others == {str(n) for n in range(40)} - {"5"}
    issues = list(read_records(Path("runs/r/prepare/issues.jsonl"), Issue))
    assert any(issue.action == "dropped" and "'5' is a near copy of a target case" in issue.reason for issue in issues)


def test_the_teacher_is_not_paid_for_what_nobody_measures(command):
    write("a.jsonl", healthai(12))
    write("b.jsonl", healthai(5, 500))
    head = {"language": "zh", "teacher": {"model": "textbook", "endpoint": "textbook"}}
    files = {"source": "a.jsonl", "target": "b.jsonl", "train": 1, "validation": 0, "test": 1}
    Path("r.yaml").write_text(json.dumps({**head, "prepare": files, "predict": {"models": ["teacher"]}}))
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    said = api.load_predictions("runs/r/predict/predictions.jsonl")
    assert {p.case_id for p in said} == {case.id for case in splits()["test"]}


def rows_about(cases: list[Case], text: str = "") -> list[Row]:
    turn = "<record>\n{}\n</record>"
    return [
        Row(
            id=f"{case.id}#0",
            messages=(Message(role="user", content=turn.format(text or case.text)),),
            answer="{}",
            case_id=case.id,
        )
        for case in cases
    ]


def test_what_is_predicted_keeps_its_ids(command):
    """Both files count from 0, and some source rows are the target's own."""
    write("a.jsonl", healthai(30))
    target = [{"id": n, "feature_content": record(n if n < 3 else 500 + n)} for n in range(10)]
    write("b.jsonl", target)
    recipe(target="b.jsonl", train=8, validation=1, test=1, most_dropped=0)
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    found = splits()
    assert {case.id: case.text for case in found["target"]} == {
        str(row["id"]): row["feature_content"] for row in target
    }
    learned = {case.id for name in ("train", "validation", "test") for case in found[name]}
    assert learned == {str(n) if n >= 10 else f"{n}-2" for n in range(3, 30)}
    write("b.jsonl", [{"id": 1, "feature_content": " "}])
    recipe(target="b.jsonl", train=8, validation=1, test=1, most_dropped=1)
    code, _, err = command("run", "r.yaml", "--fresh")
    assert (code, "b.jsonl gives no target case" in err) == (2, True), err


@pytest.fixture
def prepared(command):
    """A run with all roles, and a training section that stops before it loads a model."""
    write("a.jsonl", healthai(40))
    write("b.jsonl", healthai(10, 500))
    text = json.dumps(
        {
            "student": "no/such-model",
            "prepare": {"source": "a.jsonl", "target": "b.jsonl", "train": 8, "validation": 1, "test": 1},
            "sft": {"from": ["prepare", "own"]},
        }
    )
    Path("r.yaml").write_text(text)
    Path("own").mkdir()
    assert command("run", "r.yaml", "prepare")[0] == 0
    return command


def test_training_refuses_what_is_tested_on(prepared):
    found = splits()
    item = redteam.items()[7]
    mended = "run prepare again"
    cases = {
        "rows are about held-out cases": rows_about(found["train"][:3] + found["test"][:1]),
        "(target)": rows_about(found["target"][:1]),
        f"({item.id})": rows_about(found["train"][:1], text=f"主诉: {item.text}。"),
    }
    for complaint, rows in cases.items():
        write_records(Path("own/rows.jsonl"), rows)
        code, _, err = prepared("run", "r.yaml", "sft", "--fresh")
        assert (code, complaint in err.splitlines()[-1]) == (2, True), err
    write_records(Path("own/rows.jsonl"), rows_about(found["train"][:3]))
    moved = [case.model_copy(update={"id": "moved"}) for case in found["test"][:1]]
    write_records(Path("runs/r/prepare/train.jsonl"), found["train"] + moved)
    code, _, err = prepared("run", "r.yaml", "sft", "--fresh")
    assert (code, mended in err, "moved" in err) == (2, True, True), err


def test_a_target_is_learned_only_when_it_is_said(prepared):
    write_records(Path("own/rows.jsonl"), rows_about(splits()["target"][:2]))
    code, _, err = prepared("run", "r.yaml", "sft", "include_target=true", "--fresh")
    assert "held-out" not in err
    assert "no/such-model" in err  # it got as far as the model
    assert code == 2


def test_no_figure_is_about_a_case_that_was_trained_on(command):
    gold = Diagnosis(diseases=("Common cold",))
    cases = [
        Case(id=str(n), text=f"cough {n}", language="en", source="s", group=str(n), gold=gold, gold_source="human")
        for n in range(6)
    ]
    Path("own").mkdir()
    write_records(Path("own/target.jsonl"), cases)
    said = [Prediction(case_id=case.id, model="student", prompt_sha="", output=gold) for case in cases]
    write_records(Path("own/predictions.jsonl"), said)
    write_records(Path("own/rows.jsonl"), rows_about(cases[:2]))
    Path("r.yaml").write_text("evaluate: {from: own}\n")
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    assert "2 cases were trained on, and are left out" in out
    assert json.loads(Path("runs/r/evaluate/metrics.json").read_text())["student"]["top1"]["n"] == 4
    told = "Transductive: the teacher's labels of 2 target cases were learned"
    assert told in out.replace("\n", " ")
    assert told in html.unescape(Path("runs/r/evaluate/report.html").read_text())
    write_records(Path("own/rows.jsonl"), rows_about(cases))
    code, _, err = command("run", "r.yaml", "--fresh")
    assert (code, "all 6 cases were trained on" in err) == (2, True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=12),
)
def test_rows_in_are_cases_and_reported_rows(command, flips):
    """Bytes flipped anywhere: each line is a case, a dropped issue, or a red-team row; never a traceback."""
    rows = [*healthai(12), {"id": 12, "feature_content": record(12), "source": "red_team_safety"}]
    content = bytearray("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    for place, bits in flips:
        content[int(place * len(content))] ^= bits
    Path("a.jsonl").write_bytes(content)
    recipe(most_dropped=1.0, train=1, validation=0, test=1)
    code, _, err = command("run", "r.yaml", "--fresh")
    assert (code in (0, 2), "Traceback" in err) == (True, False), err
    if code == 0:
        metrics = json.loads(Path("runs/r/prepare/metrics.json").read_text())
        issues = read_records(Path("runs/r/prepare/issues.jsonl"), Issue)
        dropped = Counter(issue.action for issue in issues)["dropped"]
        assert metrics["rows"] == metrics["cases"] + metrics["redteam"] + dropped
        assert metrics["dropped"] == dropped


def test_every_layout_can_be_loaded_in_a_notebook(command, tmp_path):
    write("a.jsonl", [{"question": "怎么办", "think": "想一想", "answer": "就医"}])
    (case,) = api.load_cases("a.jsonl")
    assert (case.text, case.gold.think, case.gold.answer) == ("怎么办", "想一想", "就医")
