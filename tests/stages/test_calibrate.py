"""From answers with gold to a calibration beside the weights, and to what predict, export and diagnose make of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor import api
from preceptor.app import recipe
from preceptor.clinical.textbook.book import load
from preceptor.core.records import Case, Diagnosis, Message
from preceptor.stages.base import sha256, write_records
from preceptor.stages.calibrations import beside
from preceptor.tasks.calibrated import digest
from preceptor.tasks.prompts import record_in
from tests.stages.scripted import Scripted, scripted

NAMES = sorted((disease.en for disease in load().diseases.values()), key=len)
"""A longer name takes more tokens, and so gets a lower confidence of the scripted server."""


def right(number: int) -> bool:
    """The model is right about three of four: the shorter the name it gives, the surer it is and the more often."""
    return number % 20 < 15


def cases(n: int, first: int = 0) -> list[Case]:
    """Case i is said to have disease i % 20, which is true where `right` says so."""
    made = []
    for number in range(first, first + n):
        gold = NAMES[number % 20] if right(number) else "Gout"
        record = f"Man, {number}, fever for 3 days; record {number}."
        made.append(
            Case(
                id=f"c{number}",
                text=record,
                language="en",
                source="test",
                group=f"c{number}",
                meta={"specialty": "ward" if number % 8 else "clinic"},
                gold=Diagnosis(diseases=(gold,)),
                gold_source="human",
            )
        )
    return made


def said(body) -> str:
    record = record_in([Message(role=m["role"], content=m["content"]) for m in body["messages"]]) or ""
    number = int(record.rstrip(".").split()[-1])
    return json.dumps({"diseases": [NAMES[number % 20]], "reason": ["fever"]})


@pytest.fixture
def server(command) -> Iterator[Scripted]:
    """A model's folder without weights, whose answers come from a server; 100 cases to learn from and 40 new ones."""
    Path("base").mkdir()
    Path("base/config.json").write_text('{"model_type": "qwen3"}')
    Path("own").mkdir()
    write_records(Path("own/validation.jsonl"), cases(100))
    write_records(Path("own/test.jsonl"), cases(40, 1000))
    with scripted(said) as running:
        endpoint = json.dumps({"url": running.url, "name": "scripted", "model": "m", "logprobs": 1})
        ask = f"model: ./base, from: ./own, endpoint: {endpoint}"
        Path("r.yaml").write_text(f"""
language: en
calibrate: {{{ask}, risk: 0.2}}
predict: {{{ask.replace("model: ./base", "models: [./base]").replace("./own", "[./own, calibrate]")}}}
predict_twice: {{{ask.replace("model: ./base", "models: [./base]")}, strategy: two_stage}}
""")
        yield running


def test_what_is_learned_is_applied(command, server) -> None:
    before = sha256(Path("base"))
    code, out, err = command("run", "r.yaml", "calibrate", "predict")
    assert code == 0, err
    assert "by 5-fold cross-validation on 100 of 100 answers, T " in out
    assert "answers below" in out
    assert "sets hold a true disease for" in out
    metrics = json.loads(Path("runs/r/calibrate/metrics.json").read_text())
    assert metrics["top1"] == 0.75
    assert metrics["ece"] < metrics["ece_uncalibrated"]
    assert metrics["set_coverage"] >= 0.85
    left = beside(Path("base"))
    assert left == beside(Path("runs/r/calibrate"))
    (found,) = left.by_way.values()
    assert (found.n, found.asked) == (100, digest(found.way))
    assert sha256(Path("base")) == before

    threshold = found.selection.threshold
    assert found.selection.kept > 40
    predictions = api.load_predictions("runs/r/predict/predictions.jsonl")
    assert len(predictions) == 40
    for prediction in predictions:
        ((name, raw),) = prediction.uncalibrated.items()
        assert prediction.confidence == {name: found.first(raw)}
        assert prediction.abstained == (found.first(raw) < threshold)
        assert (prediction.withheld is not None) == prediction.abstained
        assert prediction.prediction_set
    kept = [int(p.case_id[1:]) for p in predictions if not p.abstained]
    assert 0 < len(kept) < 40
    assert sum(not right(number) for number in kept) <= 0.2 * len(kept)

    # The same again asks nobody; another start of the same section only whom it owes.
    asked = len(server.asked)
    Path("runs/r/calibrate/done.json").unlink()
    assert command("run", "r.yaml", "calibrate")[0] == 0
    assert len(server.asked) == asked
    assert beside(Path("base")) == left


@pytest.mark.slow
def test_another_way_of_asking_is_not_calibrated_and_that_is_told(command, server) -> None:
    assert command("run", "r.yaml", "calibrate")[0] == 0
    code, out, _ = command("run", "r.yaml", "predict_twice", "limit=2")
    assert code == 0
    assert "confidences are not calibrated: it is asked otherwise than it was for calibration.json" in " ".join(
        out.split()
    )
    assert "(strategy, prompt differ)" in " ".join(out.split())
    for prediction in api.load_predictions("runs/r/predict_twice/predictions.jsonl"):
        assert (prediction.uncalibrated, prediction.prediction_set) == ({}, None)

    # Each way has its own, beside the other; new weights have none.
    assert command("run", "r.yaml", "calibrate", "calibrate.strategy=two_stage", "--fresh")[0] == 0
    assert {one.way["strategy"] for one in beside(Path("base")).by_way.values()} == {"zero_shot", "two_stage"}
    Path("base/config.json").write_text('{"model_type": "qwen3", "changed": 1}')
    assert command("run", "r.yaml", "predict", "limit=2")[0] == 0
    out = command("run", "r.yaml", "predict", "limit=4")[1]
    assert "calibration.json is about other weights; run calibrate again" in " ".join(out.split())


def test_a_calibration_of_another_model_is_said_to_be(command, server) -> None:
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "qwen3", "other": 1}')
    Path("r.yaml").write_text(Path("r.yaml").read_text().replace("models: [./base]", "models: [./other]", 1))
    code, out, err = command("run", "r.yaml", "calibrate", "predict")
    assert code == 0, err
    (told,) = [line for line in " ".join(out.split()).split("predict: ") if "not calibrated" in line]
    assert "./other: confidences are not calibrated: calibration.json is about other weights" in told


def test_a_folder_that_has_nothing_to_read_is_refused(command, server) -> None:
    Path("empty").mkdir()
    code, _, err = command("run", "r.yaml", "calibrate", "calibrate.from=[./own, ./empty]")
    assert (code, "calibrate.from: ./empty has nothing that calibrate reads: validation.jsonl" in err) == (2, True)


def test_a_section_applies_the_calibration_that_it_reads_from(command, server) -> None:
    """Whatever a later section left beside the same weights for the same way of asking."""
    recipe = Path("r.yaml").read_text()
    later = "calibrate_lax: {" + recipe.split("calibrate: {")[1].split(", risk")[0] + ", coverage: null}"
    Path("r.yaml").write_text(recipe.replace("predict: {", f"{later}\npredict: {{", 1))
    assert command("run", "r.yaml", "calibrate", "calibrate_lax", "predict")[0] == 0
    (lax,) = beside(Path("base")).by_way.values()
    assert (lax.selection, lax.quantiles) == (None, {})
    predictions = api.load_predictions("runs/r/predict/predictions.jsonl")
    assert all(p.prediction_set for p in predictions)
    assert any(p.withheld for p in predictions)


def test_answers_from_before_a_calibration_are_on_the_same_scale_as_those_after(command, server) -> None:
    """A limit that grew, with a calibration between the two starts: no file mixes calibrated and raw answers."""
    ask = "predict_own: {" + Path("r.yaml").read_text().split("predict: {")[1].replace(", calibrate]", "]")
    Path("own.yaml").write_text(f"language: en\n{ask.splitlines()[0]}\n")
    assert command("run", "own.yaml", "predict_own.limit=10")[0] == 0
    before = api.load_predictions("runs/own/predict_own/predictions.jsonl")
    assert not any(p.uncalibrated for p in before)
    assert command("run", "r.yaml", "calibrate")[0] == 0
    code, out, _ = command("run", "own.yaml", "predict_own.limit=20")
    assert code == 0
    after = api.load_predictions("runs/own/predict_own/predictions.jsonl")
    assert len(after) == 20
    assert [p.uncalibrated for p in after[:10]] == [p.confidence for p in before]
    assert all(p.uncalibrated and p.prediction_set for p in after)
    held = sum(p.withheld is not None for p in after)
    assert held
    assert f"20 of 20 answered, 0 abstained, {held} withheld" in " ".join(out.split())
    # Without it they are as they were.
    Path("base/calibration.json").unlink()
    assert command("run", "own.yaml", "predict_own.limit=21")[0] == 0
    raw = api.load_predictions("runs/own/predict_own/predictions.jsonl")
    assert raw[:10] == before
    assert not any(p.uncalibrated or p.withheld or p.prediction_set for p in raw)


def test_another_calibration_is_another_request_of_predict(command, server) -> None:
    assert command("run", "r.yaml", "calibrate", "predict")[0] == 0
    assert command("run", "r.yaml", "calibrate", "calibrate.method=isotonic", "--fresh")[0] == 0
    code, _, err = command("run", "r.yaml", "predict")
    assert (code, "inputs.calibration.json changed" in err) == (2, True)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ([c.model_copy(update={"gold": None, "gold_source": None}) for c in cases(30)], "none of 30 validation cases"),
        (cases(12), "12 of 12 answers name a disease with a confidence, of 20 due"),
    ],
)
def test_without_gold_it_is_skipped_and_says_so(command, server, made: list[Case], told: str) -> None:
    write_records(Path("own/validation.jsonl"), made)
    code, out, _ = command("run", "r.yaml", "calibrate")
    assert code == 0
    assert f"calibrate: skipped, as {told}" in " ".join(out.split())
    assert json.loads(Path("runs/r/calibrate/metrics.json").read_text())["skipped"].startswith(told)
    assert not Path("base/calibration.json").exists()
    assert not Path("runs/r/calibrate/calibration.json").exists()
    assert "done already" in command("run", "r.yaml", "calibrate")[2]


def test_a_risk_out_of_reach_is_told_and_nothing_is_withheld(command, server) -> None:
    code, out, _ = command("run", "r.yaml", "calibrate", "predict", "calibrate.risk=0.001")
    assert code == 0
    out = " ".join(out.split())
    assert "no answer is withheld: no threshold keeps the risk of 0.1% with 90% certainty on 100 answers" in out
    assert "the lowest risk in reach is" in out
    assert not any(p.withheld for p in api.load_predictions("runs/r/predict/predictions.jsonl"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("calibrate.model=base", "calibrate: model: base: nothing can be left beside its weights"),
        ("calibrate.model=mini", "model: mini: nothing can be left beside its weights; name a section or a folder"),
        ("calibrate.model=teacher", "calibrate: teacher: nobody is named; add it to the section, or to the top"),
        ("calibrate.recalibrate=smoothing", "recalibrate: it is for a teacher's calibration, and model is student;"),
        ("calibrate.model=a+b", "calibrate: model: a+b: of two models in turn neither's confidence is the pair's"),
        ("calibrate.risk=1.5", "calibrate.risk"),
        ("calibrate.coverage=0", "calibrate.coverage"),
        ("calibrate.sets=raps", "calibrate.sets"),
        ("calibrate.model=none", "no earlier section 'none'"),
        ("task=consult", "task: advice names no diseases"),
    ],
)
def test_a_wrong_request_is_one_line(command, override: str, told: str) -> None:
    Path("r.yaml").write_text("calibrate: {}\n")
    code, _, err = command("run", "r.yaml", override)
    assert (code, told in " ".join(err.split())) == (2, True), err


@pytest.mark.slow
def test_the_recipes_teacher_is_not_asked(command) -> None:
    Path("r.yaml").write_text("""
teacher: {model: m, endpoint: http://127.0.0.1:9/v1}
student: mini
prepare: {source: textbook, train: 1, validation: 1, test: 1}
sft: {}
calibrate: {}
""")
    section = recipe.load("r.yaml").sections[-1]
    assert section.config.teacher is None
    assert "calibrate" not in command("plan", "r.yaml")[1]


def test_a_damaged_calibration_is_one_line(command, server) -> None:
    assert command("run", "r.yaml", "calibrate")[0] == 0
    Path("base/calibration.json").write_text('{"by_way": 3}')
    code, _, err = command("run", "r.yaml", "predict_twice")
    assert code == 2
    assert "base/calibration.json: not what calibrate writes" in " ".join(err.split())
    assert "take it away, and calibrate anew" in " ".join(err.split())


TRAINED = """
language: en
seed: 1
student: mini
teacher: {model: textbook, endpoint: textbook}
prepare: {source: textbook, style: short, train: 300, validation: 60, test: 10}
label: {}
curate: {}
sft: {method: lora, rank: 8, lr: 3e-3, epochs: 1, batch_size: 16, accumulation: 1}
calibrate: {risk: 0.05, by: null}
predict: {models: [student]}
export: {research: true}
"""


@pytest.mark.slow
def test_a_trained_model_carries_its_calibration_into_diagnose_and_export(command) -> None:
    Path("r.yaml").write_text(TRAINED)
    code, _, err = command("run", "r.yaml")
    assert code == 0, err
    (found,) = beside(Path("runs/r/sft/adapter")).by_way.values()
    for made in ("adapter", "model"):
        (carried,) = beside(Path("runs/r/export") / made).by_way.values()
        assert carried.model_copy(update={"weights": found.weights}) == found
        assert (carried.weights == found.weights) == (made == "adapter")  # merged weights are others
    assert all(p.uncalibrated for p in api.load_predictions("runs/r/predict/predictions.jsonl") if not p.failure)
    record = "Man, 70, breathlessness on exertion for 7 days."
    for place in ("runs/r/sft", "runs/r/export"):
        code, out, _ = command("diagnose", record, "--model", place)
        out = " ".join(out.split())
        assert code == ("No answer: " in out)
        assert "With 90% certainty: " in out or "No answer: " in out
        assert "Illustrative, not for care." in out or "No answer: " in out
    out = " ".join(command("diagnose", "男，70岁，活动后气促7天。", "--model", "runs/r/sft")[1].split())
    assert "confidences are not calibrated: it is asked otherwise" in out
