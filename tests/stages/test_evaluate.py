"""The stage from files to table and page."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    metrics = evaluate.run(evaluate.Config(**config), context)
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


def test_predictions_about_other_cases_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in `from:` name one that predicts on them"):
        ran(tmp_path, [case(1, ASTHMA)], [[answer(2, ASTHMA)]])


def test_a_model_that_nobody_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.about: no model 'studnt'; did you mean 'student'\?"):
        ran(tmp_path, [case(1, ASTHMA)], [[answer(1, ASTHMA)]], about="studnt")
