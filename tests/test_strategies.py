"""Every strategy, for both tasks and in both languages, against the textbook teacher, in one table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "strategies.yaml"
STRATEGIES = ("zero_shot", "few_shot", "two_stage", "designed", "self_consistency")
WIDE = {**os.environ, "COLUMNS": "160"}
SMALL = ("prepare.train=40", "prepare.validation=12", "prepare.test=24", "label.limit=20")


def command(*words: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "preceptor", *words], cwd=folder, capture_output=True, text=True, check=False, env=WIDE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_strategies_stand_in_one_table(tmp_path: Path) -> None:
    names = [f"{task}-{language}" for task in ("diagnosis", "consult") for language in ("en", "zh")]
    for name in names:
        task, language = name.split("-")
        told = command(
            "run", str(RECIPE), f"name={name}", f"task={task}", f"language={language}", *SMALL, folder=tmp_path
        )
        for strategy in STRATEGIES:
            assert f"{strategy}: 24 of 24 answered" in told, told
    shown = command("compare", *(f"{name}:*" for name in names), folder=tmp_path)
    lines = shown.splitlines()
    for name in names:
        for strategy in STRATEGIES:
            assert any(line.split()[:2] == [f"{name}:{strategy}", "24"] for line in lines), shown
