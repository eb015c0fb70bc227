"""What leaves a run: weights, card, data sheet, layouts and submission, or one line that says what is not measured."""

import json
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.records import Diagnosis, Failure, FailureKind, Message, Prediction, Row
from preceptor.model import load
from preceptor.stages.base import write_records
from preceptor.stages.export import _lacking
from tests.model import tiny

RECIPE = """
seed: 1
student: ./base
prepare: {source: known.jsonl, train: 6, validation: 0, test: 2, target: asked.jsonl}
sft: {method: lora, rank: 2, epochs: 1, batch_size: 4, lr: 1e-2, from: [./own, prepare]}
predict: {models: [student], max_tokens: 6}
export: {research: true, stated: {contact: 'ward 3'}}
"""


def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture
def recipe(command):
    """A recipe beside its base and its rows."""
    Path("r.yaml").write_text(RECIPE)
    tiny.save(tiny.qwen(), Path("base"))
    turn = Message(role="user", content="<record>\n咳嗽3天, cough\n</record>")
    rows = [Row(id=str(n), messages=(turn,), answer='{"diseases": ["感冒"]}', case_id="c") for n in range(8)]
    for name, ids in (("known", range(100, 108)), ("asked", (30, 4, 17))):
        cases = [{"id": n, "feature_content": f"主诉: 咳嗽{n}天\n现病史: {chr(0x4E00 + 7 * n) * 40}"} for n in ids]
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases), "utf-8"
        )
    Path("own").mkdir()
    write_records(Path("own/rows.jsonl"), rows)
    return command


@pytest.mark.slow
def test_everything_leaves(recipe):
    code, out, err = recipe("run", "r.yaml")
    assert code == 0, err
    folder = Path("runs/r/export")
    assert "nats a token from its adapter" in out
    for kind in ("adapter", "model"):
        mark = "FOR RESEARCH ALONE, not for use with patients. Not measured before this export: "
        assert mark in (folder / kind / "README.md").read_text("utf-8")
        assert (folder / kind / "RESEARCH_ONLY.txt").read_text("utf-8").startswith(mark)
        assert load.load(folder / kind).context == 512
    assert "ward 3" in (folder / "datasheet.md").read_text("utf-8")
    assert lines(folder / "ms_swift" / "train.jsonl")[0]["messages"][-1]["content"] == '{"diseases": ["感冒"]}'
    assert "preceptor" in json.loads((folder / "llamafactory" / "dataset_info.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["divergence"] < 1e-4
    assert metrics["not_measured"][0] == "calibration"

    # Every target case once, in order; an answer of six tokens is none, and that is listed.
    assert [line["id"] for line in lines(folder / "submission.jsonl")] == [30, 4, 17]
    failed = [line for line in lines(folder / "submission_failed.jsonl") if line["kind"] == "failed"]
    assert [line["case_id"] for line in failed] == ["30", "4", "17"]
    assert metrics["cases"] == metrics["failed"] == 3

    # Interrupted before the end, what is whole already stays as it is, and what was half is made again.
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    (folder / "done.json").unlink()
    (folder / "adapter").rename(folder / ".adapter.new")
    assert recipe("run", "r.yaml", "export")[0] == 0
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / ".adapter.new").exists()


def test_what_is_not_measured_stays_at_home(recipe):
    code, _, err = recipe("run", "r.yaml", "export.research=false")
    assert code == 2
    err = err.splitlines()[-1]
    assert "export: not measured: " in err
    assert "calibration and on how many cases (`evaluate` tells `ece`" in err
    assert "or set research: true, which exports with a watermark" in err
    assert not list(Path("runs/r/export").glob("model"))


def test_damage_is_one_line(recipe):
    assert recipe("run", "r.yaml", "prepare", "sft", "predict")[0] == 0
    weights = Path("runs/r/sft/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    code, _, err = recipe("run", "r.yaml", "export")
    assert code == 2
    assert "runs/r/sft/adapter: damaged safetensors" in err.splitlines()[-1]


@pytest.mark.slow
def test_only_the_students_own_first_answers_are_submitted(recipe):
    assert recipe("run", "r.yaml", "prepare", "sft", "predict")[0] == 0
    cases = api.load_cases("runs/r/prepare/target.jsonl")
    path = Path("runs/r/predict/predictions.jsonl")
    answers = [
        Prediction(case_id=case.id, model=model, sample=sample, prompt_sha="", output=Diagnosis(diseases=(name,)))
        for case in cases[:2]
        for model, sample, name in (("base", 0, "wrong"), ("student", 0, f"flu {case.id}"), ("student", 1, "later"))
    ]
    failed = Prediction(
        case_id=cases[2].id, model="student", prompt_sha="", failure=Failure(kind=FailureKind.TRUNCATED)
    )
    write_records(path, [*answers, failed])
    assert recipe("run", "r.yaml", "export", "export.submission.fallback=待查")[0] == 0
    told = [line["diseases"] for line in lines("runs/r/export/submission.jsonl")]
    assert told == [f"flu {cases[0].id}", f"flu {cases[1].id}", "待查"]
    assert lines("runs/r/export/submission_failed.jsonl") == [
        {"case_id": cases[2].id, "kind": "failed", "why": "truncated"}
    ]

    # Another model's, such as those of two specialists.
    code, _, err = recipe("run", "r.yaml", "export", "--fresh", "export.submit=bose")
    assert (code, "predictions have no model 'bose'; did you mean 'base'?" in err.splitlines()[-1]) == (2, True)
    assert recipe("run", "r.yaml", "export", "--fresh", "export.submit=base")[0] == 0
    assert [line["diseases"] for line in lines("runs/r/export/submission.jsonl")] == ["wrong", "wrong", ""]


class _Facts:
    """What of a run the gate looks at."""

    def __init__(self, *, held_out=9, leaked=0, figures=("ece",), task="diagnosis"):
        self.learned = type("Learned", (), {"held_out": held_out, "about_held_out": leaked})
        self.figures, self.task = dict.fromkeys(figures), task


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        ({}, []),
        ({"held_out": 0}, ["leak test"]),
        ({"leaked": 2}, ["leak test"]),
        ({"figures": ()}, ["calibration"]),
        ({"task": "consult"}, ["severe misses"]),
        ({"task": "consult", "figures": ("ece", "severe_miss")}, []),
        ({"task": "consult", "figures": ("severe_miss",)}, []),
        ({"task": "consult", "figures": (), "held_out": 0}, ["leak test", "severe misses"]),
    ],
)
def test_the_gate_wants_each_measurement(facts, missing):
    assert list(_lacking(_Facts(**facts))) == missing


@pytest.mark.parametrize("name", ["name", "a/b/c", "a/../b", "https://hub/a/b"])
def test_a_repository_has_an_owner_and_a_name(name, recipe):
    code, _, err = recipe("run", "r.yaml", "export", f"export.push={name}")
    assert (code, "export.push" in err) == (2, True)
