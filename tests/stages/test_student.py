"""A student from nothing to its predictions, with a model of a few thousand weights."""

import json
from pathlib import Path

import pytest

from preceptor import api
from preceptor.core.records import Message, Prediction, Row
from preceptor.stages.base import write_records

RECIPE = """
seed: 1
student: lessons
lessons: {rows: 30, shares: {write: 1}, vocabulary: 512, hidden: 32, layers: 1}
prepare: {source: textbook, style: short, train: 1, validation: 0, test: 2}
sft: {method: full, epochs: 1, batch_size: 4, lr: 1e-3, from: ./own}
predict: {models: [base, student], max_tokens: 6}
"""


@pytest.mark.slow
def test_a_student_learns_and_predicts(command):
    Path("r.yaml").write_text(RECIPE)
    turn = Message(role="user", content="<record>\ncough\n</record>")
    rows = [Row(id=str(n), messages=(turn,), answer="cold", case_id="c") for n in range(8)]
    Path("own").mkdir()
    write_records(Path("own/rows.jsonl"), rows)
    code, out, err = command("run", "r.yaml")
    assert code == 0, err
    assert "sft: 8 rows learned" in out
    told = Path("runs/r/sft/model/README.md").read_text()
    assert "**Learned from**: 8 rows" in told
    assert "ransductive" not in told
    source = json.loads(Path("runs/r/sft/config.json").read_text())["inputs"]["student"][0]["path"]
    assert source == "runs/r/lessons/model"
    predictions = api.load_predictions("runs/r/predict/predictions.jsonl")
    assert [p.model for p in predictions] == ["base", "base", "student", "student"]
    assert all(isinstance(p, Prediction) and p.usage.completion_tokens for p in predictions)
    code, out, err = command("diagnose", "Cough for three days.", "--model", "runs/r/sft")
    assert (code, "No answer: " in out) == (1, True)
    assert "runs/r/sft gave no answer that can be read" in err

    # Another model in the folder that a recipe names is another request.
    own = ("student=runs/r/lessons/model",)
    assert command("run", "r.yaml", "prepare", "sft", *own, "--runs", "again")[0] == 0
    Path("runs/r/lessons/model/generation_config.json").write_text("{}")
    code, _, err = command("run", "r.yaml", "sft", *own, "--runs", "again")
    assert code == 2
    assert "inputs.student changed" in err
