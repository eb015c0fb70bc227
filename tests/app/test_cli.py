import json
from pathlib import Path

import pytest

from preceptor.core.records import Case, Diagnosis, Failure, FailureKind, Prediction


def test_help_and_version(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(verb in out for verb in ("run", "label", "evaluate", "status", "doctor", "diagnose"))
    assert command()[:2] == (0, out)
    assert command("--version")[1].strip()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["nope"], 2, "No such command 'nope'."),
        (["run"], 2, "Missing argument 'RECIPE'."),
        (["run", "none.yaml"], 2, "none.yaml: no such recipe; did you mean 'toy.yaml'?"),
        (["run", "toy.yaml", "--frsh"], 2, "No such option"),
        (["label", "toy.yaml"], 2, "no section of the stage 'label'"),
        (["label", "toy.yaml", "numbers"], 2, "override 'numbers': write it as key=value"),
        (["status"], 2, "no runs here"),
        (["stats", "none.jsonl"], 2, "none.jsonl: no such file"),
        (["compare", "one"], 2, "compare: name two runs or more"),
        (["compare", "one", "two"], 2, "one: no such run in runs"),
        (["diagnose", "@none.txt", "--model", "x"], 2, "none.txt: No such file or directory; check the path"),
        (["diagnose", "  ", "--model", "x"], 2, "the record is empty"),
        (["diagnose", "\udcff", "--model", "x"], 2, "not UTF-8 text"),
    ],
)
def test_mistakes_are_one_line_with_a_code(command, words, code, expected):
    found, out, err = command(*words)
    assert (found, out) == (code, "")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_status_tells_done_and_failed(command):
    command("run", "toy.yaml", "double.fail=bug")
    code, out, _ = command("status")
    assert code == 0
    assert out.index("numbers") < out.index("double")
    assert "done in" in out
    assert "ZeroDivisionError" in out
    Path("runs/toy/numbers/done.json").write_text("{")
    Path("runs/elsewhere/model").mkdir(parents=True)
    Path("runs/elsewhere/model/config.json").write_text('{"model_type": "qwen3"}')
    code, out, _ = command("status")
    assert (code, out.count("damaged") >= 2, "ZeroDivisionError" in out) == (0, True, True)
    code, _, err = command("status", "toi")
    assert (code, "did you mean 'toy'?" in err) == (2, True)


def test_stats_understands_our_records_and_the_competitions(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    case = Case(id="1", text="cough", language="en", source="s", group="g", gold=Diagnosis(diseases=("cold",)))
    answers = [
        Prediction(
            case_id="1",
            model="m",
            prompt_sha="",
            text="{}",
            output=Diagnosis(diseases=("a", "b"), reason=("c",)),
        ),
        Prediction(case_id="2", model="m", prompt_sha="", failure=Failure(kind=FailureKind.EMPTY)),
    ]
    Path("cases.jsonl").write_text(case.model_dump_json() + "\nbad\n")
    Path("answers.jsonl").write_text("".join(a.model_dump_json() + "\n" for a in answers))
    Path("healthai.jsonl").write_text(
        json.dumps({"id": 1, "feature_content": "主诉: 咳嗽", "diseases": "感冒|肺炎", "reason": "1. 咳嗽；2. 发热"})
    )
    code, out, _ = command("stats", "cases.jsonl", "answers.jsonl", "healthai.jsonl")
    table = {line.split("  ")[0].strip(): line.split()[-3:] for line in out.splitlines() if line.strip()}
    assert code == 0
    assert table["rows"] == ["2", "2", "1"]
    assert table["not understood"] == ["1", "0", "0"]
    assert table["cases"] == ["1", "0", "1"]
    assert table["diseases an answer"] == ["1.0", "2.0", "2.0"]
    assert table["failed or unread"] == ["0", "1", "0"]


def test_stats_say_why_a_file_is_not_understood(command):
    Path("t.csv").write_text("pid,note\n1,cough\n")
    code, out, _ = command("stats", "t.csv")
    assert (code, "t.csv: no known layout: its rows have pid, note" in out.replace("\n", " ")) == (0, True)


@pytest.mark.slow
def test_stats_of_many_files_breaks_no_figure(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for folder in "abcdef":
        Path(folder).mkdir()
        lines = (json.dumps({"id": n, "feature_content": "主诉: 咳嗽" * 9}) + "\n" for n in range(1240))
        Path(folder, "train.jsonl").write_text("".join(lines))
    code, out, _ = command("stats", *(f"{folder}/train.jsonl" for folder in "abcdef"))
    assert (code, out.split().count("1,240")) == (0, 2 * 6), "rows and cases of each"
    assert all(f"{folder}/train" in out for folder in "abcdef"), "files of one name are told apart"


def test_doctor_answers_without_a_network(command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = command("doctor")
    assert code == 0
    assert "HF_HUB_OFFLINE is set" in " ".join(out.split())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    code, out, _ = command("doctor")
    assert (code, "can't be reached (InvalidURL)" in " ".join(out.split())) == (0, True)
