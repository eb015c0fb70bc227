"""Cases of the textbook by way of a recipe, for either task."""

import json
from pathlib import Path

import pytest

RECIPE = (
    "name: it\ntask: {task}\nlanguage: {language}\nprepare: {{source: textbook, train: 12, validation: 2, test: 3}}\n"
)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("task", "fields"), [("diagnosis", {"diseases", "reason"}), ("consult", {"think", "answer"})])
def test_gold_is_what_the_task_asks_for(command, task: str, fields: set[str], language: str) -> None:
    Path("it.yaml").write_text(RECIPE.format(task=task, language=language))
    code, _, error = command("prepare", "it.yaml")
    assert code == 0, error
    counts = {}
    for split in ("train", "validation", "test"):
        cases = [json.loads(line) for line in Path(f"runs/it/prepare/{split}.jsonl").read_text("utf-8").splitlines()]
        counts[split] = len(cases)
        assert all(fields <= set(case["gold"]) and case["gold_source"] == "textbook" for case in cases)
        assert all(("risk_level" in case["meta"]) == (task == "consult") for case in cases)
    assert counts == {"train": 12, "validation": 2, "test": 3}


def test_a_target_beside_the_textbook_is_refused(command) -> None:
    Path("it.yaml").write_text(RECIPE.format(task="diagnosis", language="en"))
    Path("asked.jsonl").write_text('{"id": 1, "feature_content": "cough"}\n')
    code, _, error = command("prepare", "it.yaml", "prepare.target=asked.jsonl")
    told = "prepare.target: beside the textbook's cases there are no target's; name files as the source"
    assert (code, told in error) == (2, True)
