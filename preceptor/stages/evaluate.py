"""Grades predictions, ours and other tools', on held-out cases beside yardsticks; shows them as a table and a page.

The yardsticks are the commonest disease and a bag of words, on the labels that the student learned from, and,
where the cases come from a world that is known, the exact answerer.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from preceptor.clinical import variants
from preceptor.clinical.names import Namer
from preceptor.clinical.textbook.book import load
from preceptor.core.errors import UserError
from preceptor.core.records import Case, Consultation, Diagnosis, Language, Prediction, Row, Task
from preceptor.report import page
from preceptor.report.baseline import YARDSTICKS, BagOfWords, commonest, exact, labelled
from preceptor.report.metrics import TEACHER, Evaluator, ModelScore
from preceptor.report.summary import UNKNOWN, Cell, Summary, Words, summarise
from preceptor.stages import recalibrating
from preceptor.stages.base import (
    RECALIBRATION,
    Context,
    Need,
    Stage,
    StageConfig,
    nearest,
    read_records,
    replacing,
    write_records,
)
from preceptor.stages.elsewhere import Inputs
from preceptor.tasks import answer, consult
from preceptor.tasks.diagnosis import textbook_namer

PROPOSALS = "proposals.csv"
_FORMULA = ("=", "+", "-", "@", "\t")
"""With which a cell begins that a spreadsheet would run."""


class Config(StageConfig):
    """What is evaluated."""

    task: Task = "diagnosis"
    language: Language = "en"
    """Of the table and the page."""
    seed: int = 0
    """Of the resampling."""
    about: str = ""
    """The model that the sentence and the cases of the page are about; by default the last one trained."""
    predictions: dict[str, str] = Field(default_factory=dict)
    """Files of predictions that were made elsewhere, by the names that their models are to have here."""
    names: str | None = None
    """The user's own table of disease names: name, code, aliases."""

    @field_validator("predictions")
    @classmethod
    def _no_yardstick(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in value if name in YARDSTICKS or not name.strip()]:
            raise ValueError(f"{taken[0]!r} is no name for a model here; call it otherwise")
        return value

    def needs(self) -> tuple[Need, ...]:
        """Held-out cases, what models said to them, and the labels for the bag of words."""
        ours = not self.predictions
        return (
            Need("cases", files=("test.jsonl", "target.jsonl"), required=ours),
            Need("predictions", files=("predictions.jsonl",), stages=("predict", "label"), required=ours),
            *([] if ours else [Need("elsewhere", paths=tuple(self.predictions.values()))]),
            *([Need("names", paths=(self.names,))] if self.names else []),
            Need("rows", files=("rows.jsonl",), required=False),
            Need("metrics.jsonl", required=False),
            Need(RECALIBRATION, required=False),
            Need("target", files=("target.jsonl",), required=False),
        )


def run(config: Config, context: Context) -> Mapping[str, Any]:
    """Writes scores.jsonl, proposals.csv and report.html; returns `model -> metric -> {value, low, high, n}`.

    Beside every F1 stands `normaliser_accuracy`, of the matching of names. Where predictions come from elsewhere,
    it also writes what they are here (predictions.jsonl) and what was wrong with their rows (issues.jsonl).
    """
    words = Words(config.language)
    found = Inputs(context)
    namer = Namer(load(), found.table())
    for conflict in namer.conflicts:
        context.say(f"{context.section}: {context.input('names')}: {conflict}")
    every_case = found.cases(None if config.predictions else config.limit)
    found.join(every_case, config.predictions, consult.parse if config.task == "consult" else answer.parse)
    predictions = found.predictions
    rows = context.optional("rows")
    learned = {row.case_id for row in read_records(rows, Row)} if rows else set()
    target = context.optional("target")
    transductive = sum(case.id in learned for case in read_records(target, Case)) if target and learned else 0
    asked = _answered(every_case[: config.limit], predictions, found.first)
    cases = [case for case in asked if case.id not in learned]
    if not cases:
        raise UserError(f"{context.section}: all {len(asked)} cases were trained on; a figure about them says nothing")
    if len(cases) < len(asked):
        context.say(f"{context.section}: {len(asked) - len(cases)} cases were trained on, and are left out")
    teacher = _teacher(cases, predictions)
    labels = {case.id: found.labels[case.id] for case in cases if case.id in found.labels.keys() - teacher.keys()}
    references = {i: label for i, label in labels.items() if isinstance(label, Consultation)}
    cases = [case.model_copy(update={"gold": references.get(case.id, case.gold)}) for case in cases]
    stand_ins = {i: label for i, label in labels.items() if isinstance(label, Diagnosis)}
    evaluator = Evaluator(cases, stand_ins | teacher, namer, task=config.task)
    with context.progress(context.section, None) as tick:
        unknown: Counter[str] = Counter()
        yardsticks = _yardsticks(rows, cases) if config.task == "diagnosis" else ()
        graded = chain(
            _graded(evaluator, _noted(predictions(), namer, unknown), tick), _graded(evaluator, yardsticks, tick)
        )
        write_records(context.folder / "scores.jsonl", graded)
        evaluation = evaluator.evaluation(config.seed)
    if config.task == "diagnosis":
        _propose(context.folder / PROPOSALS, unknown, namer)
    if config.about and config.about not in evaluation.metrics:
        raise UserError(
            f"{context.section}.about: no model {config.about!r}{nearest(config.about, evaluation.metrics)}"
        )
    summary = summarise(evaluation, words, config.about, _trained(context))
    said = [p for p in predictions() if p.model == summary.student]
    diagnosed = [p for p in said if config.task == "diagnosis"]
    shown = page.collect(evaluator.cases, page.chosen(evaluation.ranking[summary.student]), diagnosed, namer)
    notices = [words("simulation")] if any(case.source == "textbook" for case in cases) else []
    notices += [words("transductive", n=transductive)] if transductive else []
    notices += found.notices(words, len(labels))
    path = context.folder / "report.html"
    normaliser = variants.accuracy(textbook_namer())
    told = page.Beside(
        notices=notices,
        borrowed=bool(evaluator.borrowed),
        curve=_losses(None if summary.student in config.predictions else context.optional("metrics.jsonl")),
        dangers=page.dangers(evaluator.cases, said),
        normaliser=normaliser if config.task == "diagnosis" else None,
        recalibrated=recalibrating.read(context.optional(RECALIBRATION)),
    )
    html = page.render(evaluation, summary, words, context.recipe, shown, told)
    with replacing(path) as beside:
        beside.write_text(html, "utf-8")
    strangers = [words("strangers", n=evaluation.strangers)] if evaluation.strangers else []
    for line in (table(summary, words), summary.headline, *strangers, *notices, words("page", path=path)):
        context.say(line)
    beside_f1 = {"normaliser_accuracy": normaliser}
    return {
        model: {n: e.model_dump() for n, e in (row | (beside_f1 if "disease_f1" in row else {})).items()}
        for model, row in evaluation.metrics.items()
    }


def _yardsticks(rows: Path | None, cases: Sequence[Case]) -> Iterator[Prediction]:
    labels = list(labelled(read_records(rows, Row))) if rows else []
    return chain(commonest(labels, cases), BagOfWords(labels).predict(cases), exact(cases))


def _trained(context: Context) -> str:
    """The last section that trained, by whose name its model may go; empty if none did."""
    metrics = context.optional("metrics.jsonl")
    return metrics.parent.name if metrics else ""


def _losses(path: Path | None) -> list[tuple[int, float]]:
    """The steps of the student's training with their losses."""
    lines = path.read_text("utf-8").splitlines() if path else []
    return [(point["step"], point["loss"]) for point in map(json.loads, lines) if "loss" in point]


def _answered(cases: Iterable[Case], predictions: Callable[[], Iterator[Prediction]], wrong: str) -> list[Case]:
    """The cases that some model was asked about: the yardsticks are laid on those. `wrong`: what may explain none."""
    asked = {prediction.case_id for prediction in predictions()}
    found = [case for case in cases if case.id in asked]
    if not found:
        why = wrong or "in `from:` name one that predicts on them"
        raise UserError(f"evaluate: no prediction is about any of the cases; {why}")
    return found


def _teacher(cases: Iterable[Case], predictions: Callable[[], Iterator[Prediction]]) -> dict[str, Diagnosis]:
    """The teacher's first answers to the cases without gold."""
    bare = {case.id for case in cases if not isinstance(case.gold, Diagnosis)}
    answers: dict[str, Diagnosis] = {}
    if bare:
        for prediction in predictions():
            output = prediction.output if prediction.case_id in bare else None
            if prediction.model == TEACHER and isinstance(output, Diagnosis):
                answers.setdefault(prediction.case_id, output)
    return answers


def _noted(predictions: Iterable[Prediction], namer: Namer, unknown: Counter[str]) -> Iterator[Prediction]:
    """The predictions; names in them that lead to no known disease are counted."""
    for prediction in predictions:
        if isinstance(prediction.output, Diagnosis):
            unknown.update(name for name in prediction.output.diseases if not namer.knows(name))
        yield prediction


def _propose(path: Path, unknown: Counter[str], namer: Namer) -> None:
    """Writes the unknown names, the commonest first, each with the known one most like it: for a person to decide."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8-sig", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(("name", "count", "candidate", "code", "similarity"))
        for name, count in unknown.most_common():
            like = namer.proposal(name)
            safe = f"'{name}" if name.startswith(_FORMULA) else name
            sheet.writerow((safe, count, *((like.name, like.code, f"{like.similarity:.2f}") if like else ("", "", ""))))


def _graded(
    evaluator: Evaluator, predictions: Iterable[Prediction], tick: Callable[[int], None]
) -> Iterator[ModelScore]:
    for prediction in predictions:
        tick(1)
        if score := evaluator.add(prediction):
            yield score


def table(summary: Summary, words: Words) -> Table:
    """The results for a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column(words("model"), overflow="fold", min_width=9)
    for column in summary.columns:
        shown.add_column(words(column), justify="right", overflow="fold", min_width=8)
    for line in summary.lines:
        style = "bold" if line.name == summary.student else ""
        label = Text.assemble(line.label, "\n", (words("n_cases", n=line.cases), "dim"))
        shown.add_row(label, *map(_cell, line.cells), style=style)
    return shown


def _cell(cell: Cell) -> Text:
    if not cell.interval:
        return Text(UNKNOWN, style="dim")
    below = "\n".join(part for part in (cell.interval, cell.floor) if part)
    return Text.assemble(cell.text, "\n", (below, "dim"))


STAGE = Stage("evaluate", Config, run, leaves=("scores.jsonl", "report.html"))
