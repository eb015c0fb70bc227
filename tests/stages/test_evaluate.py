"""The stage from files to table and page."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Prediction, Record, Row
from preceptor.report.metrics import ModelScore
from preceptor.stages import evaluate
from preceptor.stages.base import Context, Ticks, read_records, write_records
from preceptor.tasks.prompts import load
from tests.report.made import TEXT, answer, case, failure

ASTHMA, INFLUENZA = "Bronchial asthma", "Influenza"


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Ticks]:
    def tick(done: int = 1, note: str = "", total: int | None = None) -> None:
        pass

    yield tick


def ran(
    folder: Path,
    cases: Sequence[Case],
    predictions: Sequence[Sequence[Prediction]],
    rows: Sequence[Row] = (),
    trained: str = "",
    **config: Any,
) -> tuple[Mapping[str, Any], str]:
    def wrote(name: str, records: Sequence[Record]) -> Path:
        write_records(folder / name, records)
        return folder / name

    inputs = {
        "cases": (wrote("test.jsonl", cases),),
        "predictions": tuple(wrote(f"predictions{i}.jsonl", some) for i, some in enumerate(predictions)),
    }
    if rows:
        inputs["rows"] = (wrote("rows.jsonl", rows),)
    if trained:
        (folder / trained).mkdir()
        inputs["metrics.jsonl"] = (folder / trained / "curve.jsonl",)
        inputs["metrics.jsonl"][0].write_text('{"step": 1, "loss": 2.5}\n')
    screen = Console(file=StringIO(), width=110)
    context = Context(
        recipe="quickstart",
        section="evaluate",
        folder=folder,
        runs=folder,
        inputs=inputs,
        log=logging.getLogger("test"),
        progress=_progress,
        say=screen.print,
    )
    metrics = dict(evaluate.run(evaluate.Config(**config), context))
    assert all(row["normaliser_accuracy"]["n"] > 300 for row in metrics.values() if "disease_f1" in row)
    assert isinstance(screen.file, StringIO)
    return metrics, screen.file.getvalue()


def learned() -> list[Row]:
    prompt = load("diagnosis", "zero_shot", "en")
    texts = {TEXT: ASTHMA, "Chills and aching limbs since yesterday.": INFLUENZA}
    return [
        Row(
            id=f"{i}{disease}",
            messages=prompt.render(text),
            answer=json.dumps({"diseases": [disease], "reason": []}),
            case_id=str(i),
        )
        for text, disease in texts.items()
        for i in range(5)
    ]


def test_it_reads_several_predictions_and_adds_the_yardsticks(tmp_path: Path) -> None:
    cases = [case(i, ASTHMA, differential={ASTHMA: 0.9, INFLUENZA: 0.1}) for i in range(4)]
    base = [failure(i, model="base") for i in range(4)]
    student = [answer(i, ASTHMA if i else INFLUENZA, confidence=0.8) for i in range(4)]
    metrics, told = ran(tmp_path, cases, [base, student], learned())
    assert set(metrics) == {"base", "student", "commonest", "bag_of_words", "exact"}
    assert {name: row["top1"]["value"] for name, row in metrics.items()} == {
        "base": 0,
        "student": 0.75,
        "commonest": 1,
        "bag_of_words": 1,
        "exact": 1,
    }
    assert set(metrics["student"]["top1"]) == {"value", "low", "high", "n"}
    assert "evidence_grounded" not in metrics["exact"]
    assert "—" in told
    assert "The student's first diagnosis is right in 75% of 4 held-out cases" in told
    assert "report.html" in told.replace("\n", "")
    scores = list(read_records(tmp_path / "scores.jsonl", ModelScore))
    assert len(scores) == 20
    assert [s.parts["top1"] for s in scores if s.model == "student"] == [0, 1, 1, 1]
    assert "<!doctype html>" in (tmp_path / "report.html").read_text("utf-8")


def test_yardsticks_are_laid_on_the_cases_that_were_asked(tmp_path: Path) -> None:
    cases = [case(i, ASTHMA, differential={ASTHMA: 0.9}) for i in range(9)]
    metrics, _ = ran(tmp_path, cases, [[answer(i, ASTHMA) for i in range(6)]], limit=5)
    assert {name: row["top1"]["n"] for name, row in metrics.items()} == {"student": 5, "exact": 5}


def test_without_gold_the_teacher_is_agreed_with(tmp_path: Path) -> None:
    cases = [case(i, gold=None, gold_source=None) for i in range(4)]
    teacher = [answer(i, ASTHMA, model="teacher") for i in range(4)]
    student = [answer(i, ASTHMA if i else INFLUENZA) for i in range(4)]
    metrics, told = ran(tmp_path, cases, [student, teacher], language="zh")
    assert metrics["student"]["agreement_top1"]["value"] == 0.75
    assert not {"top1", "disease_f1"} & set(metrics["student"])
    assert "这是一致性，不是准确率" in told
    assert "首位正确" not in told


def test_without_gold_and_without_a_disease_there_is_still_a_page(tmp_path: Path) -> None:
    cases = [case(i, gold=None, gold_source=None) for i in range(2)]
    metrics, _ = ran(tmp_path, cases, [[answer(i) for i in range(2)]])
    assert (metrics["student"]["parsed"]["value"], metrics["student"]["abstained"]["value"]) == (1, 1)
    assert (tmp_path / "report.html").is_file()


def test_predictions_about_other_cases_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in `from:` name one that predicts on them"):
        ran(tmp_path, [case(1, ASTHMA)], [[answer(2, ASTHMA)]])


def test_a_model_that_nobody_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.about: no model 'studnt'; did you mean 'student'\?"):
        ran(tmp_path, [case(1, ASTHMA)], [[answer(1, ASTHMA)]], about="studnt")


@pytest.mark.parametrize(
    ("trained", "about", "language", "called", "said"),
    [
        ("", "zero_shot", "en", "zero_shot", "zero_shot's first diagnosis is right in 100% of 2"),
        ("", "", "en", "votes", "votes's first diagnosis is right in 50% of 2"),
        ("", "zero_shot", "zh", "zero_shot", "zero_shot在 2 个留出病例中首位诊断正确率为 100%"),
        ("sft", "zero_shot", "en", "zero_shot", "zero_shot's first diagnosis is right in 100% of 2"),
        ("votes", "votes", "en", "Student (votes)", "The student (votes)'s first diagnosis is right in 50% of 2"),
        ("votes", "", "zh", "学生模型 (votes)", "学生模型 (votes)在 2 个留出病例中首位诊断正确率为 50%"),
        ("votes", "zero_shot", "en", "zero_shot", "zero_shot's first diagnosis is right in 100% of 2"),
        ("votes", "teacher", "en", "Teacher", "The teacher's first diagnosis is right in 0% of 2"),
    ],
)
def test_only_what_was_trained_is_called_the_student(
    tmp_path: Path, trained: str, about: str, language: str, called: str, said: str
) -> None:
    cases = [case(i, ASTHMA) for i in range(2)]
    models = {"zero_shot": (ASTHMA, ASTHMA), "votes": (ASTHMA, INFLUENZA), "teacher": (INFLUENZA, INFLUENZA)}
    told = [[answer(i, *[names[i]], model=model) for i in range(2)] for model, names in models.items()]
    _, out = ran(tmp_path, cases, told, trained=trained, about=about, language=language)
    (page,) = tmp_path.glob("report.html")
    for shown in (" ".join(out.split()), unescape(page.read_text("utf-8"))):
        assert called in shown
        assert said in shown
        assert ("Student (" in shown or "学生模型 (" in shown) is (trained == "votes")


RECORDS = {
    "1": ("主诉: 转移性右下腹痛1天\n现病史: 右下腹压痛，体温38.6℃，无腹泻。", "急性阑尾炎"),
    "2": ("主诉: 夜间喘息2周\n现病史: 活动后气喘加重，双肺哮鸣音，无发热。", "支气管哮喘"),
    "3": ("主诉: 尿频尿急2天\n现病史: 伴尿痛，无腰痛，无发热，尿白细胞升高。", "急性膀胱炎"),
    "4": ("主诉: 流涕咽痛3天\n现病史: 鼻塞，咽部充血，体温37.2℃，无咳痰。", "普通感冒"),
}
SAID = {"1": "阑尾炎", "2": "哮喘", "3": "尿路感染症候", "4": "抱歉，我无法诊断。"}


def lines(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prompt(text: str) -> str:
    return f"<|im_start|>user\n请诊断。\n{text}<|im_end|>\n<|im_start|>assistant\n"


def llamafactory(*more: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = [
        {"prompt": prompt(text), "predict": SAID[i], "label": json.dumps({"diseases": [gold]}, ensure_ascii=False)}
        for i, (text, gold) in RECORDS.items()
    ]
    return [*rows, *more]


def values(path: str = "runs/r/evaluate/metrics.json") -> dict[str, dict[str, float]]:
    metrics = json.loads(Path(path).read_text("utf-8"))
    return {model: {name: estimate["value"] for name, estimate in row.items()} for model, row in metrics.items()}


def test_predictions_from_elsewhere_get_the_same_report(command):
    golden = [{"id": i, "feature_content": text, "diseases": gold} for i, (text, gold) in RECORDS.items()]
    lines("cases.jsonl", golden)
    lines("generated_predictions.jsonl", llamafactory({"prompt": "x" * 50, "predict": "肺炎", "label": ""}))
    Path("sub.csv").write_text("id,diseases\n1,急性阑尾炎\n2,哮喘\n3,膀胱炎\n9,肺炎\n", "utf-8")
    Path("r.yaml").write_text(
        "language: zh\nevaluate: {from: cases.jsonl, predictions: {lf: generated_predictions.jsonl, sub: sub.csv}}\n"
    )
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    found = values()
    assert set(found) == {"lf", "sub"}
    assert 0.9 < found["lf"]["normaliser_accuracy"] < 1
    assert {name: found["lf"][name] for name in ("top1", "parsed", "failed_refused", "unmapped")} == {
        "top1": 0.5,
        "parsed": 0.75,
        "failed_refused": 0.25,
        "unmapped": pytest.approx(1 / 3),
    }
    assert (found["sub"]["top1"], found["sub"]["unmapped"]) == (1, 0)
    told = out.replace("\n", "")
    assert "generated_predictions.jsonl：有 1 行未计入，首个在第 5 行：prompt: it holds no case's record" in told
    assert "sub.csv：有 1 行未计入，首个在第 5 行：id: no case '9'" in told
    issues = [json.loads(line) for line in Path("runs/r/evaluate/issues.jsonl").read_text("utf-8").splitlines()]
    assert [(issue["file"], issue["line"]) for issue in issues] == [("generated_predictions.jsonl", 5), ("sub.csv", 5)]
    ours = list(read_records(Path("runs/r/evaluate/predictions.jsonl"), Prediction))
    assert [(p.model, p.case_id) for p in ours] == [*(("lf", i) for i in "1234"), *(("sub", i) for i in "123")]
    assert [p.text for p in ours if p.model == "lf"] == list(SAID.values())
    page = Path("runs/r/evaluate/report.html").read_text("utf-8")
    assert "sub.csv：有 1 行未计入" in page
    assert "尿路感染症候,1,下尿路感染,N30.0,0.73" in Path("runs/r/evaluate/proposals.csv").read_text("utf-8-sig")


def test_a_label_is_agreed_with_where_there_is_no_gold(command):
    lines("generated_predictions.jsonl", llamafactory())
    Path("r.yaml").write_text("evaluate: {language: en}\n")
    code, out, err = command("evaluate", "r.yaml", "evaluate.predictions.lf=generated_predictions.jsonl")
    assert code == 0, err
    found = values()["lf"]
    assert (found["agreement_top1"], "top1" in found, found["parsed"]) == (0.5, False, 0.75)
    told = " ".join(out.split())
    assert "4 cases have no gold: the label beside the prediction stands in for it" in told
    assert "this is agreement with labels, not accuracy" in told


def test_ours_and_theirs_stand_side_by_side(command):
    cases = [case(i, ASTHMA) for i in range(3)]
    Path("own").mkdir()
    write_records(Path("own/test.jsonl"), cases)
    write_records(Path("own/predictions.jsonl"), [answer(i, ASTHMA) for i in range(3)])
    lines("theirs.jsonl", [{"id": f"case-{i}", "response": INFLUENZA} for i in (2, 0, 1)])
    Path("r.yaml").write_text("evaluate: {from: own, predictions: {theirs: theirs.jsonl}}\n")
    assert command("run", "r.yaml")[0] == 0
    assert {model: row["top1"] for model, row in values().items()} == {"student": 1, "theirs": 0}
    for name, problem in (
        ("student", "a model of ours has that name already; call theirs.jsonl otherwise"),
        ("exact", "is no name"),
    ):
        Path("r2.yaml").write_text(f"evaluate: {{from: own, predictions: {{{name}: theirs.jsonl}}}}\n")
        code, _, err = command("run", "r2.yaml")
        assert (code, problem in " ".join(err.split())) == (2, True), err


def test_rows_joined_by_their_place_are_said_to_be(command):
    lines("cases.jsonl", [{"id": i, "feature_content": text, "diseases": gold} for i, (text, gold) in RECORDS.items()])
    lines(
        "cut.jsonl", [{"prompt": prompt(text[:20]), "predict": gold, "label": gold} for text, gold in RECORDS.values()]
    )
    Path("r.yaml").write_text("evaluate: {from: cases.jsonl, predictions: {cut: cut.jsonl}}\n")
    code, out, err = command("run", "r.yaml")
    assert (code, values()["cut"]["top1"]) == (0, 1), err
    assert "cut.jsonl: 4 rows hold no whole record and were joined to the cases by their order" in " ".join(out.split())


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("{predictions: {m: none.jsonl}}", "evaluate.predictions: no file none.jsonl (seen from"),
        ("{predictions: {m: bare.jsonl}}", "no cases: name a section or a file that has them in evaluate.from"),
        (
            "{from: cases.jsonl, predictions: {m: bare.jsonl}}",
            "the first row that was left out: bare.jsonl:1: id: missing",
        ),
        ("{from: cases.jsonl, predictions: {'': bare.jsonl}}", "'' is no name for a model here"),
        ("{from: bare.jsonl, predictions: {m: bare.jsonl}}", "bare.jsonl: no known layout"),
        (
            "{from: cases.jsonl, predictions: {m: bare.jsonl}, names: bare.jsonl}",
            "bare.jsonl:1: no column 'name' in it",
        ),
    ],
)
def test_what_can_not_be_used_is_one_line(recipe, problem, command):
    lines("cases.jsonl", [{"id": i, "feature_content": text, "diseases": gold} for i, (text, gold) in RECORDS.items()])
    lines("bare.jsonl", [{"response": "肺炎"}])
    Path("r.yaml").write_text(f"evaluate: {recipe}\n")
    code, _, err = command("run", "r.yaml")
    assert (code, problem in " ".join(err.split())) == (2, True), err


def test_the_users_names_count(command):
    lines("cases.jsonl", [{"id": i, "feature_content": text, "diseases": gold} for i, (text, gold) in RECORDS.items()])
    lines(
        "p.jsonl",
        [{"id": "3", "output": "尿路感染症候"}, {"id": "1", "output": "阑尾炎症"}, {"id": "2", "output": "喘息样哮喘"}],
    )
    Path("names.csv").write_text("name,code,aliases\n急性膀胱炎,N30.0,尿路感染症候\n哮喘,J46,\n,A1,\n", "utf-8")
    Path("r.yaml").write_text("evaluate: {from: cases.jsonl, predictions: {m: p.jsonl}, names: names.csv}\n")
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    assert values()["m"]["top1"] == pytest.approx(2 / 3)
    assert values()["m"]["unmapped"] == pytest.approx(1 / 3)
    told = " ".join(out.split())
    assert "names.csv: 哮喘: J46 by the table, no more J45" in told
    assert "names.csv: 1 of its rows were left out, the first in line 4: name: it is empty" in told
    rows = Path("runs/r/evaluate/proposals.csv").read_text("utf-8-sig").splitlines()
    assert rows == ["name,count,candidate,code,similarity", "喘息样哮喘,1,哮喘,J46,0.57"]
    html = Path("runs/r/evaluate/report.html").read_text("utf-8")
    assert html.count('<span class="verdict right">') == 2  # the cases on the page go by the same names
    assert '<span class="hit">尿路感染症候</span>' in html


def test_advice_from_elsewhere_is_graded_for_safety(command):
    chest, cold = "胸痛两小时，向左肩放射，出冷汗。", "打喷嚏、流清涕两天，没有发热。"
    send, rest = "可能是心肌梗死，请立即拨打120。", "多喝水，注意休息；三天后仍不见好，请到门诊看看。"
    rows = [
        {"id": i, "instruction": "请给出建议。", "input": text, "output": said, "meta": {"risk_level": level}}
        for i, (text, said, level) in {"1": (chest, send, "critical"), "2": (cold, rest, "low")}.items()
    ]
    lines("cases.jsonl", rows)
    lines(
        "p.jsonl",
        [
            {"id": "1", "output": "<think>胸痛向左肩放射，出冷汗。</think>这不是急诊，在家休息，不用打120。"},
            {"id": "2", "output": "<think>只是流清涕"},
        ],
    )
    Path("r.yaml").write_text("task: consult\nlanguage: zh\nevaluate: {from: cases.jsonl, predictions: {m: p.jsonl}}\n")
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    found = values()["m"]
    assert {name: found[name] for name in ("parsed", "severe_miss", "urgent_recall", "failed_truncated")} == {
        "parsed": 0.5,
        "severe_miss": 1,
        "urgent_recall": 0,
        "failed_truncated": 0.5,
    }
    assert "normaliser_accuracy" not in found
    assert "严重漏判 1 例" in out
    assert '<mark class="danger" title="否认急症">' in Path("runs/r/evaluate/report.html").read_text("utf-8")

    # Without cases, prompts are asked and the labels beside them are the reference.
    lines("lf.jsonl", [{"prompt": prompt(chest), "predict": rest, "label": f"<think>胸痛。</think>{send}"}])
    Path("l.yaml").write_text("task: consult\nevaluate: {predictions: {m: lf.jsonl}}\n")
    code, out, err = command("run", "l.yaml")
    assert code == 0, err
    found = values("runs/l/evaluate/metrics.json")["m"]
    assert (found["urgent_recall"], 0 < found["rouge_l"] < 1) == (0, True)
    assert "1 cases have no gold: the label beside the prediction stands in for it" in " ".join(out.split())
    assert not Path("runs/l/evaluate/issues.jsonl").read_text("utf-8")
    Path("r.yaml").write_text("task: consult\nteacher: {endpoint: textbook}\nrefine: {}\n")
    code, _, err = command("run", "r.yaml")
    assert (
        code,
        "of consult there are prepare, design, label, curate, sft, distill, predict, judge, evaluate, export yet"
        in " ".join(err.split()),
    ) == (2, True), err
