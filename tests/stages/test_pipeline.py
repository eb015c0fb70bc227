"""The stages over real files and the real textbook teacher."""

import json
import re
from pathlib import Path

import pytest
import stamina

from preceptor import api
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Issue, Row
from preceptor.stages.base import read_records
from preceptor.tasks import prompts
from preceptor.tasks.prompts import record_in

RECIPE = """
language: en
seed: 1
teacher: {model: textbook, endpoint: textbook}
prepare: {source: textbook, style: short, train: 12, validation: 2, test: 4}
label: {}
curate: {}
predict_teacher: {models: [teacher]}
"""


def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_from_cases_to_rows(command):
    Path("r.yaml").write_text(RECIPE)
    assert command("run", "r.yaml", "prepare", "label", "curate", "limit=8")[0] == 0
    cases = api.load_cases("runs/r/prepare/train.jsonl")
    predictions = api.load_predictions("runs/r/label/predictions.jsonl")
    assert [p.case_id for p in predictions] == [case.id for case in cases]
    assert {p.model for p in predictions} == {"teacher"}
    assert len(cases) == 8
    rows = list(read_records(Path("runs/r/curate/rows.jsonl"), Row))
    assert rows
    assert all(api.grade(row.answer, case).parts["parsed"] for row, case in zip(rows, cases, strict=False))
    assert cases[0].text in rows[0].messages[-1].content
    first = predictions[0]

    # More cases: the answers stay, and only what is owed is asked.
    assert command("run", "r.yaml")[0] == 0
    predictions = api.load_predictions("runs/r/label/predictions.jsonl")
    assert len(predictions) == 12
    assert predictions[0] == first
    assert api.load_cases("runs/r/prepare/train.jsonl")[:8] == cases
    evaluation = api.evaluate(
        api.load_cases("runs/r/prepare/test.jsonl"),
        api.load_predictions("runs/r/predict_teacher/predictions.jsonl"),
    )
    assert evaluation.metrics["teacher"]["parsed"].value == 1
    told = command("status")[1]
    assert "label" in told
    assert "12" in told


@pytest.mark.slow
def test_thinking_is_learned_where_it_is_wanted(command):
    recipe = RECIPE.replace("label: {}", "label: {prompt: thinking}")
    Path("r.yaml").write_text(recipe.replace("curate: {}", "curate: {prompt: thinking, think: true}"))
    assert command("run", "r.yaml", "prepare", "label", "curate")[0] == 0
    labels = {label.case_id: label for label in api.load_predictions("runs/r/label/predictions.jsonl")}
    rows = list(read_records(Path("runs/r/curate/rows.jsonl"), Row))
    assert rows
    for row in rows:
        label = labels[row.case_id]
        thought, _, answer = row.answer.partition("</think>\n\n")
        assert thought == f"<think>\n{label.thinking}\n"
        assert label.thinking
        assert "think" not in label.text
        assert api.parse(row.answer).output == api.parse(answer).output
        assert row.messages == prompts.load("diagnosis", "thinking", "en").render(record_in(row.messages))

    # Labels of a teacher that was not asked to think can't teach thinking: none is left, and that is told.
    Path("silent.yaml").write_text(RECIPE.replace("curate: {}", "curate: {think: true}"))
    code, shown, _ = command("run", "silent.yaml", "prepare", "label", "curate")
    assert (code, "dropped: unthought 12" in shown) == (1, True)


def test_healthai_files(command):
    rows = [{"id": n, "feature_content": f"主诉: 咳嗽{n % 30}天"} for n in range(60)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path("a.jsonl").write_text(text + "{bad\n", "utf-8")
    Path("r.yaml").write_text("prepare: {source: '*.jsonl', train: 4, validation: 1, test: 1}\n")
    code, out, _ = command("run", "r.yaml")
    assert (code, re.findall(r"rows (?:read|dropped) +(\d+)", out)) == (0, ["61", "1"])
    splits = {name: api.load_cases(f"runs/r/prepare/{name}.jsonl") for name in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 60
    groups = [{case.group for case in cases} for cases in splits.values()]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    issue, *copies = read_records(Path("runs/r/prepare/issues.jsonl"), Issue)
    assert (issue.file, issue.line, issue.action) == ("a.jsonl", 61, "dropped")
    assert [copy.line for copy in copies] == list(range(31, 61)), "the copies are named"
    assert json.loads(Path("runs/r/prepare/metrics.json").read_text())["repeated"] == 30
    Path("a.jsonl").write_text(text, "utf-8")
    code, _, err = command("run", "r.yaml")
    assert (code, "inputs.source changed" in err) == (2, True)


def test_an_importer_of_the_users_own(command):
    Path("mine.py").write_text(
        "from preceptor.core.records import Case\n"
        "def rows(row):\n"
        "    return Case(id=row['n'], text=row['t'], language='en', source='mine', group=row['n'])\n"
    )
    Path("a.jsonl").write_text('{"n": "1", "t": "cough"}\n')
    Path("r.yaml").write_text("prepare: {source: a.jsonl, importer: 'mine.py:rows', validation: 0, test: 0}\n")
    assert command("run", "r.yaml")[0] == 0
    (case,) = read_records(Path("runs/r/prepare/train.jsonl"), Case)
    assert case.source == "mine"


def test_curate_drops_failures_and_what_stands_on_nothing(command):
    text = "Cough for three days. No fever."
    answers = [
        {"diseases": ["cold"], "reason": ["Cough for three days"]},
        {"diseases": ["cold"], "reason": ["blood in the urine"]},
        {"diseases": ["cold"], "reason": ["fever"]},
        {"diseases": ["cold"], "reason": ["Cough for three days", "blood in the urine"]},
        {"diseases": ["cold"], "reason": []},
        {"diseases": [], "reason": []},
        None,
    ]
    Path("own").mkdir()
    with Path("own/train.jsonl").open("w") as cases, Path("own/predictions.jsonl").open("w") as labels:
        for number, answer in enumerate(answers):
            case = Case(id=str(number), text=text, language="en", source="s", group=str(number))
            cases.write(case.model_dump_json() + "\n")
            result = {"output": answer} if answer else {"failure": {"kind": "unparsed"}}
            row = {"case_id": case.id, "model": "teacher", "prompt_sha": "", **result}
            labels.write(json.dumps(row) + "\n")
    Path("r.yaml").write_text("curate: {from: ./own}\n")
    assert command("run", "r.yaml")[0] == 0
    kept = {row["case_id"]: json.loads(row["answer"])["reason"] for row in lines("runs/r/curate/rows.jsonl")}
    assert kept == {"0": ["Cough for three days"], "3": ["Cough for three days"], "5": []}
    dropped = {row["case_id"]: row["reason"] for row in lines("runs/r/curate/dropped.jsonl")}
    assert dropped == {"1": "ungrounded", "2": "ungrounded", "4": "ungrounded", "6": "unparsed"}


@pytest.fixture
def _no_retries():
    stamina.set_active(False)
    yield
    stamina.set_active(True)


@pytest.mark.usefixtures("_no_retries")
def test_a_dead_teacher_and_a_missing_key_are_one_line(command):
    Path("r.yaml").write_text(RECIPE)
    command("run", "r.yaml", "prepare")
    code, _, err = command("label", "r.yaml", "teacher.endpoint.url=http://127.0.0.1:9/v1")
    assert (code, "can't be reached at http://127.0.0.1:9/v1" in err.splitlines()[-1]) == (1, True)
    code, _, err = command("label", "r.yaml", "teacher.endpoint={url: 'http://127.0.0.1:9/v1', key_env: NO_SUCH_KEY}")
    assert (code, "NO_SUCH_KEY" in err.splitlines()[-1]) == (2, True)


@pytest.mark.usefixtures("_no_retries")
def test_a_teacher_that_answers_nothing_has_not_labelled(command):
    Path("r.yaml").write_text(RECIPE)
    Path("p.txt").write_text("=== user\n<record>\n{record}\n</record>")  # no act: the textbook refuses it
    command("run", "r.yaml", "prepare")
    code, _, err = command("label", "r.yaml", "label.prompt=p.txt")
    assert (code, "answered none of 12 cases, the last one: 400" in err.splitlines()[-1]) == (1, True)
    assert not Path("runs/r/label/done.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "it gives NoneType, not a generator"),
        ("yield 'hello'", "it yields str, not a Request"),
        ("yield from zero_shot(case, asking)", "it returns NoneType, not a Prediction"),
        (
            "p = yield from zero_shot(case, asking); return p.model_copy(update={'case_id': 'x'})",
            "its prediction is about 'x'",
        ),
    ],
)
def test_a_strategy_that_gives_nonsense_is_told_and_can_be_mended(command, body, expected):
    imports = "from preceptor.tasks.strategies import zero_shot\n"
    Path("own.py").write_text(f"{imports}def mine(case, asking):\n    {body}\n")
    Path("r.yaml").write_text(RECIPE)
    command("run", "r.yaml", "prepare", "limit=2")
    code, _, err = command("label", "r.yaml", "limit=2", "label.strategy=own.py:mine")
    assert code == 2
    assert err.splitlines()[-1].startswith("preceptor: strategy 'own.py:mine': ")
    assert expected in err.splitlines()[-1]
    Path("own.py").write_text(f"{imports}def mine(case, asking):\n    return (yield from zero_shot(case, asking))\n")
    assert command("label", "r.yaml", "limit=2", "label.strategy=own.py:mine")[0] == 0


def test_cases_that_are_none_are_told_by_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("not json\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no known layout: it is empty, or no row of it can be read"):
        api.load_cases(path)


@pytest.mark.slow
def test_a_teacher_refines_the_metadata(command):
    """The textbook's cases come with their own specialty; the teacher's word replaces it and is marked."""
    Path("r.yaml").write_text(RECIPE.replace("label: {}", "refine: {}\nlabel: {}"))
    assert command("run", "r.yaml", "prepare", "refine", "label")[0] == 0
    before = {case.id: case for case in api.load_cases("runs/r/prepare/train.jsonl")}
    after = api.load_cases("runs/r/refine/train.jsonl")
    assert [case.id for case in after] == list(before)
    assert {case.meta["sources"]["risk_level"] for case in after} == {"teacher"}
    assert {case.meta["risk_level"] for case in after} <= {"low", "medium", "high", "critical"}
    assert all(case.model_copy(update={"meta": before[case.id].meta}) == before[case.id] for case in after)
    assert len(api.load_predictions("runs/r/label/predictions.jsonl")) == 12
    sent = json.loads(Path("runs/r/refine/metrics.json").read_text())
    assert (sent["cases"], sent["refined"], sent["failed"]) == (18, 18, 0)


def test_a_curate_that_came_to_nothing_takes_other_settings(command):
    Path("r.yaml").write_text(RECIPE)
    assert command("run", "r.yaml", "prepare", "label")[0] == 0
    code, _, err = command("curate", "r.yaml", "curate.think=true")
    assert (code, "no label is left to learn" in " ".join(err.split())) == (1, True), err
    code, _, err = command("curate", "r.yaml")
    assert code == 0, err
    assert "the old folder is kept" in " ".join(err.split())
    assert Path("runs/r/curate.1/dropped.jsonl").read_bytes()
    code, _, err = command("curate", "r.yaml", "curate.think=true")  # what is done is not undone
    assert (code, "think was" in " ".join(err.split())) == (2, True), err
