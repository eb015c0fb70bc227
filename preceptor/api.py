"""The same for a notebook: load records, grade, evaluate, without a recipe.

from preceptor import api
cases = api.load_cases("cases.jsonl")
api.grade(prediction, case)
api.evaluate(cases, predictions).metrics["student"]["top1"]
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Issue, Prediction, Row, Score, Task
from preceptor.data import answers
from preceptor.data.files import Imported, importer_of, read, sniff
from preceptor.report.metrics import Evaluation, Evaluator
from preceptor.stages.base import read_records
from preceptor.tasks import consult, diagnosis
from preceptor.tasks.diagnosis import parse

_T = TypeVar("_T")

__all__ = [
    "Case",
    "Consultation",
    "Diagnosis",
    "Prediction",
    "Row",
    "Score",
    "evaluate",
    "grade",
    "load_cases",
    "load_predictions",
    "parse",
]


def load_cases(path: str | Path) -> list[Case]:
    """The cases of a file in any layout that `preceptor prepare` reads, a run's own too.

    Raises:
        UserError: a row makes no case.
    """
    cases: list[Case] = []
    for found in read(Path(path), importer_of(sniff(Path(path)), Path(path))):
        if isinstance(found, Imported):
            cases.append(found.case)
        elif found.action == "dropped":
            raise UserError(f"{found.file}:{found.line}: {found.problem}")
    return cases


def load_predictions(
    path: str | Path, cases: Iterable[Case] | None = None, model: str | None = None
) -> list[Prediction]:
    """The predictions of a file, as label and predict leave them, or of another tool under the name `model`.

    Another tool's rows are joined to the `cases` by id, by the record in the prompt, or by their order; without
    cases, their ids are taken as they are.

    Raises:
        UserError: a row is no prediction, or about no case.
    """
    if model is None:
        return list(read_records(Path(path), Prediction))
    if cases is None:
        return [*_good(answers.predictions(Path(path), model))]
    return [joined.prediction for joined in _good(answers.read(Path(path), model, answers.Index(cases)))]


def _good(found: Iterable[_T | Issue]) -> Iterator[_T]:
    for one in found:
        if not isinstance(one, Issue):
            yield one
        elif one.action == "dropped":
            raise UserError(f"{one.file}:{one.line}: {one.problem}")


def grade(answer: Prediction | Diagnosis | Consultation | str, case: Case) -> Score:
    """What an answer is worth: a prediction, its output, or a raw reply; advice where the case's gold is advice."""
    advised = isinstance(case.gold, Consultation)
    if isinstance(answer, str):
        read = (consult.parse(answer) if advised else parse(answer)).output
    else:
        read = answer.output if isinstance(answer, Prediction) else answer
    if advised:
        return consult.grade(read if isinstance(read, Consultation) else None, case)
    return diagnosis.grade(read if isinstance(read, Diagnosis) else None, case)


def evaluate(
    cases: Iterable[Case], predictions: Iterable[Prediction], seed: int = 0, task: Task = "diagnosis"
) -> Evaluation:
    """Metrics of each model with intervals, reliability, and failures by cause."""
    evaluator = Evaluator(cases, task=task)
    for prediction in predictions:
        evaluator.add(prediction)
    return evaluator.evaluation(seed)
