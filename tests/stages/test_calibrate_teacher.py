"""A teacher's tokens held against gold: the real textbook teacher, one that is too sure, and one that is not enough."""

import json
import shutil
from pathlib import Path

import pytest

from preceptor.core.errors import UserError
from preceptor.core.recalibration import METHODS, Recalibrated
from preceptor.core.records import Case, Diagnosis, Message
from preceptor.llm.ledger import Ledger
from preceptor.stages import recalibrating
from preceptor.stages.base import write_records
from preceptor.tasks.prompts import record_in
from tests.stages.scripted import scripted

RECIPE = """
language: {language}
seed: 2
teacher:
  model: textbook
  endpoint: {{name: {confidence}, start: "{{python}} -m preceptor teacher --port {{port}} --confidence {confidence}"}}
prepare: {{source: textbook, style: short, train: 1, validation: 250, test: 1}}
calibrate: {{model: teacher}}
"""
LEFT = Path("runs/r/calibrate/recalibration.json")


def metrics():
    return json.loads(Path("runs/r/calibrate/metrics.json").read_text())


@pytest.mark.parametrize(
    ("confidence", "language", "low", "high"),
    [
        pytest.param("honest", "zh", 0.8, 1.25, marks=pytest.mark.slow),
        pytest.param("over", "en", 1.15, 3.0, marks=pytest.mark.slow),
        pytest.param("under", "zh", 0.3, 0.75, marks=pytest.mark.slow),
    ],
)
def test_the_temperature_tells_what_is_wrong_with_a_teacher(command, confidence, language, low, high):
    Path("r.yaml").write_text(RECIPE.format(confidence=confidence, language=language))
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    found = recalibrating.read(LEFT)
    assert found.chosen.method == "temperature"
    assert low < found.chosen.value < high
    assert found.teacher == f"textbook at {confidence}"
    assert 200 < found.cases <= found.n <= 250
    after = found.methods["temperature"].after
    if confidence != "honest":
        assert after.nll < found.before.nll
    if confidence == "under":
        assert after.ece < found.before.ece / 2
        assert found.methods["smoothing"].value < 0.001  # it can only take away
    told = " ".join(out.split())
    assert f"{found.n} decisions in {found.cases} of 250 answers; by 5-fold cross-validation" in told
    assert (
        f"temperature T {found.chosen.value:.2f} (chosen): ECE {found.before.ece:.3f} -> {after.ece:.3f} "
        f"({after.ece_floor:.3f}), NLL {found.before.nll:.3f} -> {after.nll:.3f}"
    ) in told
    assert all(f"calibrate: {method} " in told for method in METHODS)


def cases(n: int) -> list[Case]:
    """Three of four have what the scripted teacher says they have."""
    return [
        Case(
            id=f"c{number}",
            text=f"Man, {number}.",
            language="en",
            source="test",
            group=f"c{number}",
            gold=Diagnosis(diseases=("Gout" if number % 4 else "Influenza",)),
            gold_source="human",
        )
        for number in range(n)
    ]


def said(body) -> str:
    record = record_in([Message(role=m["role"], content=m["content"]) for m in body["messages"]])
    return json.dumps({"diseases": ["Gout"], "reason": [record]})


@pytest.fixture
def server(command):
    """A teacher that believes each token with .78, and 60 cases with gold."""
    Path("own").mkdir()
    write_records(Path("own/validation.jsonl"), cases(60))
    with scripted(said) as running:
        Path("r.yaml").write_text(
            f"language: en\nteacher: {running.teacher()}\n"
            "calibrate: {model: teacher, from: ./own, recalibrate: resoftmax, logprobs: 3}\n"
        )
        yield running


def test_it_is_asked_once_and_as_it_labels(command, server):
    assert command("run", "r.yaml", "calibrate.limit=50")[0] == 0
    assert len(server.asked) == 50
    assert {body["top_logprobs"] for body in server.asked} == {3}
    assert command("run", "r.yaml")[0] == 0
    assert len(server.asked) == 60
    left, told = LEFT.read_bytes(), metrics()
    assert told["recalibration"] == recalibrating.read(LEFT).chosen.model_dump()
    assert told["recalibration"]["method"] == "resoftmax"
    assert told["asked"] == told["decided"] == told["answered"] == 60
    assert told["ece"] == told["methods"]["resoftmax"]["ece"] != told["ece_uncalibrated"]
    assert sum(one["n"] for one in told["reliability_uncalibrated"]) == told["n"]

    # Killed while an answer was written, or anything that came after.
    predictions = Path("runs/r/calibrate/predictions.jsonl")
    predictions.write_bytes(predictions.read_bytes()[:-30])
    for name in ("recalibration.json", "metrics.json", "done.json"):
        Path("runs/r/calibrate", name).unlink()
    assert command("run", "r.yaml")[0] == 0
    assert (len(server.asked), LEFT.read_bytes(), metrics()) == (60, left, told)

    # Whatever lies in the ledger is not paid for again, whoever asks.
    shutil.rmtree("runs/r")
    assert command("run", "r.yaml", "calibrate.recalibrate=smoothing")[0] == 0
    assert len(server.asked) == 60
    found = recalibrating.read(LEFT)
    assert found.chosen.method == "smoothing"
    assert found.methods == Recalibrated.model_validate_json(left).methods
    with Ledger(Path("runs/ledger.sqlite")) as ledger:
        assert ledger.summary().replies == 60


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            [one.model_copy(update={"gold": None, "gold_source": None}) for one in cases(40)],
            "none of 40 validation cases",
        ),
        (cases(12), "12 of 12 answers tell how sure the teacher was, of 30 due"),
    ],
)
def test_without_gold_it_is_skipped_and_says_so(command, server, made, told):
    write_records(Path("own/validation.jsonl"), made)
    code, out, _ = command("run", "r.yaml")
    assert code == 0
    assert f"calibrate: skipped, as {told}" in " ".join(out.split())
    assert metrics()["skipped"].startswith(told)
    assert not LEFT.exists()
    assert len(server.asked) == (12 if "12" in told else 0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "calibrate.risk=0.1",
            "risk: it is for a student's calibration, and model is teacher; leave it out",
        ),
        ("calibrate.strategy=two_stage", "strategy: the last reply of two_stage decides nothing by itself"),
        ("calibrate.recalibrate=isotonic", "calibrate.recalibrate"),
        ("calibrate.logprobs=0", "calibrate.logprobs"),
    ],
)
def test_a_wrong_request_is_one_line(command, server, override, told):
    code, _, err = command("run", "r.yaml", override)
    assert (code, told in " ".join(err.split())) == (2, True), err
    assert not server.asked


def test_a_damaged_file_is_one_line(command, server):
    assert command("run", "r.yaml")[0] == 0
    LEFT.write_text('{"n": 3}')
    with pytest.raises(UserError, match=r"recalibration\.json: not what calibrate writes"):
        recalibrating.read(LEFT)
    assert recalibrating.read(None) is None


def test_the_page_shows_it(command, server):
    write_records(Path("own/test.jsonl"), cases(4))
    with Path("r.yaml").open("a") as recipe:
        recipe.write("predict: {from: ./own, models: [teacher]}\nevaluate: {from: [./own, predict]}\n")
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    page = Path("runs/r/evaluate/report.html").read_text()
    found = recalibrating.read(LEFT)
    assert "Does the teacher know how sure it is?" in page
    for one in found.methods.values():
        assert f"<td>{one.value:.2f}</td><td><b>{one.after.ece:.3f}</b>" in page
    assert page.count('class="before"') == 3 * len(found.before.reliability)
    assert "Re-softmax (FIRST)<small>applied</small>" in page
